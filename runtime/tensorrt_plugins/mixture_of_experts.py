"""MixtureOfExperts as a plugin; its definition is `graph_passes.ops.moe`."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.mixture_of_experts import (
    MixtureProblem,
    MixtureTensors,
    every_mixture_kernel,
    launch_mixture_of_experts,
    mixture_workspace_bytes,
)
from runtime.kernels.cuda.mixture_problem import ELEMENTS
from runtime.tensorrt_plugins.operation import Operation
from runtime.tensorrt_plugins.signature import Attributes, Signature, Sizes, Tensor, Types


class MixtureOfExperts(Operation[MixtureProblem]):
    """N tokens, C channels, E experts, K of them chosen, I intermediate channels."""

    signature = Signature(
        name="MixtureOfExperts",
        attributes={"activation": str},
        inputs=(
            Tensor("x", "elements", "NC"),
            Tensor("weight", "float32", "NK"),
            Tensor("expert", "int64", "NK"),
            Tensor("gate", "elements", "EIC"),
            Tensor("up", "elements", "EIC"),
            Tensor("down", "elements", "ECI"),
        ),
        outputs=(Tensor("y", "elements", "NC"),),
        dynamic="N",
        choices={"elements": tuple(ELEMENTS)},
    )

    def problem(self, attributes: Attributes, sizes: Sizes, types: Types) -> MixtureProblem:
        return MixtureProblem(
            tokens=sizes["N"],
            hidden=sizes["C"],
            intermediate=sizes["I"],
            experts=sizes["E"],
            top_k=sizes["K"],
            activation=str(attributes["activation"]),
            element=types["elements"],
        )

    def workspace_bytes(self, problem: MixtureProblem, limits: DeviceLimits) -> int:
        return mixture_workspace_bytes(problem, limits)

    def kernels(self, problem: MixtureProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
        """Those for fewer tokens too: their number changes from step to step."""
        return every_mixture_kernel(problem, limits)

    def launch(
        self,
        launcher: Launcher,
        problem: MixtureProblem,
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
    ) -> None:
        x, weight, expert, gate, up, down = inputs
        (y,) = outputs
        tensors = MixtureTensors(x, weight, expert, gate, up, down, y, workspace)
        launch_mixture_of_experts(launcher, problem, tensors)


MIXTURE_OF_EXPERTS = MixtureOfExperts()
