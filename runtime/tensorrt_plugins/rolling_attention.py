"""RollingAttention and PackedRollingAttention as plugins; their definitions are in `graph_passes.ops`:
`rolling_attention` and `packed_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.rolling_attention import (
    launch_rolling_attention,
    rolling_attention_kernels,
    rolling_attention_workspace_bytes,
)
from runtime.kernels.cuda.rolling_problem import ACTIVATION_TYPES, RING_TYPES, RollingProblem, RollingTensors
from runtime.kernels.cuda.rolling_types import TYPE_BYTES
from runtime.tensorrt_plugins.operation import Operation
from runtime.tensorrt_plugins.signature import UNKNOWN, Attributes, Signature, Sizes, Tensor, Types

_PROJECTED = (
    Tensor("query", "activations", "BTHD"),
    Tensor("key", "activations", "BTGD"),
    Tensor("value", "activations", "BTGD"),
)
_REST = (
    Tensor("cos", "float32", "BTd"),
    Tensor("sin", "float32", "BTd"),
    Tensor("past_key", "ring", "BGSD"),
    Tensor("past_value", "ring", "BGSD"),
    Tensor("start", "int64", "B"),
    Tensor("count", "int64", "B"),
)


class RollingAttention(Operation[RollingProblem]):
    """B batch rows, T tokens, H query heads, G KV heads, D head dim, d = D / 2, S slots of a ring."""

    signature: ClassVar[Signature] = Signature(
        name="RollingAttention",
        attributes={"scale": float, "window": int, "interleaved": int, "rounds": int},
        defaults={"rounds": 0},  # these kernels compute in the types that they are given, whatever it says
        inputs=(*_PROJECTED, *_REST),
        outputs=(
            Tensor("attended", "activations", "BTHD"),
            Tensor("present_key", "ring", "BGSD"),
            Tensor("present_value", "ring", "BGSD"),
        ),
        dynamic="BT",
        choices={"activations": ACTIVATION_TYPES, "ring": RING_TYPES},
        aliases={1: 5, 2: 6},
    )

    def problem(self, attributes: Attributes, sizes: Sizes, types: Types) -> RollingProblem:
        if 2 * sizes["d"] != sizes["D"]:
            raise BackendError(
                f"{self.signature.name} was given cos and sin for {sizes['d']} pairs, and a head of {sizes['D']} "
                f"numbers has {sizes['D'] // 2}."
            )
        return RollingProblem(
            batch=sizes["B"],
            tokens=sizes["T"],
            heads=sizes["H"],
            kv_heads=sizes["G"],
            head_dim=sizes["D"],
            slots=sizes["S"],
            window=int(attributes["window"]),
            scale=float(attributes["scale"]),
            interleaved=bool(attributes["interleaved"]),
            activations=types["activations"],
            ring=types["ring"],
        )

    def hardest(self, low: Sizes, high: Sizes) -> Iterator[Sizes]:
        """A chunk needs more the larger it is; a step of one token may need the most for any number of rows."""
        if low["T"] == 1:
            for rows in range(low["B"], high["B"] + 1):
                yield {**high, "B": rows, "T": 1}
        if high["T"] > 1:
            yield high

    def workspace_bytes(self, problem: RollingProblem, limits: DeviceLimits) -> int:
        return rolling_attention_workspace_bytes(problem, limits)

    def kernels(self, problem: RollingProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
        return rolling_attention_kernels(problem, limits)

    def projections(self, problem: RollingProblem, inputs: Sequence[int]) -> tuple[int, int, int]:
        """Addresses of the first token's query, key and value."""
        query, key, value = inputs[:3]
        return query, key, value

    def launch(
        self,
        launcher: Launcher,
        problem: RollingProblem,
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
    ) -> None:
        query, key, value = self.projections(problem, inputs)
        cos, sin, key_ring, value_ring, start, count = inputs[-len(_REST) :]
        tensors = RollingTensors(
            query=query,
            key=key,
            value=value,
            cos=cos,
            sin=sin,
            key_ring=key_ring,
            value_ring=value_ring,
            start=start,
            count=count,
            attended=outputs[0],
            workspace=workspace,
        )
        launch_rolling_attention(launcher, problem, tensors)


class PackedRollingAttention(RollingAttention):
    """The same with one input for queries, keys and values: P = H + 2 G heads."""

    signature = replace(
        RollingAttention.signature,
        name="PackedRollingAttention",
        attributes={**RollingAttention.signature.attributes, "heads": int, "kv_heads": int},
        inputs=(Tensor("projected", "activations", "BTPD"), *_REST),
        implied="P",
        from_attributes={"H": "heads", "G": "kv_heads"},
        aliases={1: 3, 2: 4},
    )

    def problem(self, attributes: Attributes, sizes: Sizes, types: Types) -> RollingProblem:
        heads = sizes["H"] + 2 * sizes["G"]
        if sizes["P"] not in (UNKNOWN, heads):
            raise BackendError(
                f"{self.signature.name} was given {sizes['P']} heads, but {sizes['H']} query heads and {sizes['G']} KV "
                f"heads make {heads}."
            )
        stride = heads * sizes["D"]
        return replace(
            super().problem(attributes, sizes, types), query_stride=stride, key_stride=stride, value_stride=stride
        )

    def projections(self, problem: RollingProblem, inputs: Sequence[int]) -> tuple[int, int, int]:
        head = problem.head_dim * TYPE_BYTES[problem.activations]
        key = inputs[0] + problem.heads * head
        return inputs[0], key, key + problem.kv_heads * head


ROLLING_ATTENTION = RollingAttention()
PACKED_ROLLING_ATTENTION = PackedRollingAttention()
