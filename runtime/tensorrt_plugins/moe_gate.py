"""MoEGate as a plugin; its definition is `graph_passes.ops.moe_gate`."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.moe_gate import GateProblem, GateTensors, launch_moe_gate, moe_gate_kernels
from runtime.tensorrt_plugins.operation import Operation
from runtime.tensorrt_plugins.signature import Attributes, Signature, Sizes, Tensor, Types


class MoEGate(Operation[GateProblem]):
    """N tokens, E experts, K of them chosen."""

    signature = Signature(
        name="MoEGate",
        attributes={"top_k": int},
        inputs=(Tensor("logits", "float32", "NE"),),
        outputs=(Tensor("weight", "float32", "NK"), Tensor("expert", "int64", "NK")),
        dynamic="N",
        from_attributes={"K": "top_k"},
    )

    def problem(self, attributes: Attributes, sizes: Sizes, types: Types) -> GateProblem:
        return GateProblem(tokens=sizes["N"], experts=sizes["E"], top_k=sizes["K"])

    def workspace_bytes(self, problem: GateProblem, limits: DeviceLimits) -> int:
        return 0

    def kernels(self, problem: GateProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
        return moe_gate_kernels(problem)

    def launch(
        self, launcher: Launcher, problem: GateProblem, inputs: Sequence[int], outputs: Sequence[int], workspace: int
    ) -> None:
        launch_moe_gate(launcher, problem, GateTensors(inputs[0], *outputs))


MOE_GATE = MoEGate()
