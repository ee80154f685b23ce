"""Every plugin op with its attributes, types and sizes, as a model of one node, and what to feed it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.ops import OPS, OPSET
from graph_passes.ops.activations import ACTIVATIONS
from graph_passes.ops.base import declare
from tests.support.graphs import Arrays

_INTEGERS = {"start_B", "count_B", "expert_NK"}


@dataclass(frozen=True, slots=True)
class Case:
    """An op with its attributes and the static extents of its inputs, by letter; other extents are open.

    types: of inputs that are not what their names say. given: how many of its inputs there are, None for all.
    """

    op: str
    attributes: Mapping[str, int | float | str]
    extents: Mapping[str, int]
    types: Mapping[str, ir.DataType] = field(default_factory=dict)
    given: int | None = None

    def __str__(self) -> str:
        settings = {**self.attributes, **self.extents, **{k: v.name for k, v in self.types.items()}}
        parts = [self.op, *(f"{k}{v}" for k, v in settings.items())]
        return "-".join(parts if self.given is None else [*parts, f"{self.given} inputs"])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that are there."""
        return OPS[self.op].inputs[: self.given]

    def dtype(self, name: str) -> ir.DataType:
        """The type in which the op gets or gives a value."""
        ring = re.sub("^present_", "past_", name)
        if ring in self.types or name in self.types:
            return self.types.get(name, self.types.get(ring, ir.DataType.FLOAT))
        if name in _INTEGERS:
            return ir.DataType.INT64
        return ir.DataType.BOOL if name.startswith("visible") else ir.DataType.FLOAT

    @property
    def shapes(self) -> list[tuple[int | str, ...]]:
        names = self.inputs
        if OPS[self.op].pointwise:  # any rank, one shape
            return [tuple(self.extents)] * len(names)
        return [tuple(self.extents.get(s, 1 if s == "1" else s) for s in name.rpartition("_")[2]) for name in names]


BF16, F16, I8, U8 = (getattr(ir.DataType, name) for name in ("BFLOAT16", "FLOAT16", "INT8", "UINT8"))
_STACKS = ("gate_EIC", "up_EIC", "down_ECI")
_RINGS = ("past_key_BGSD", "past_value_BGSD")


def _rolling(window: int, interleaved: int, rings: ir.DataType = ir.DataType.FLOAT) -> Case:
    op = "RollingAttentionInt8" if rings == I8 else "RollingAttention"
    attributes: dict[str, int | float | str] = {"scale": 0.6, "window": window, "interleaved": interleaved, "rounds": 0}
    return Case(op, attributes, {}, {} if rings == ir.DataType.FLOAT else dict.fromkeys(_RINGS, rings))


def _packed(window: int, interleaved: int, rings: ir.DataType = ir.DataType.FLOAT) -> Case:
    alone = _rolling(window, interleaved, rings)
    attributes = {**alone.attributes, "heads": 2, "kv_heads": 1}  # what the examples have
    return Case("PackedRollingAttention", attributes, {}, alone.types)


def _quantized(K: int, N: int, bits: int, block: int, zero: bool, scale: ir.DataType = ir.DataType.FLOAT) -> Case:
    types = {"packed_NBb": U8, "zero_NZ": U8, "scale_NB": scale}
    return Case(
        "QuantizedMatMul",
        {"K": K, "N": N, "bits": bits, "block_size": block},
        {"K": K, "N": N},
        types,
        given=None if zero else 3,
    )


def _quantized_experts(bits: int, block: int, zero: bool, activation: str, scale: ir.DataType) -> Case:
    sizes = {"hidden": 40, "intermediate": 24, "num_experts": 3}
    types = {name: U8 for name in OPS["QuantizedMixtureOfExperts"].inputs if name.endswith(("ERBb", "ERZ"))}
    types |= {f"{name}_scale_ERB": scale for name in ("gate", "up", "down")}
    attributes: dict[str, int | float | str] = {
        "activation": activation,
        "bits": bits,
        "block_size": block,
        **sizes,
        "zero_points": int(zero),
    }
    return Case("QuantizedMixtureOfExperts", attributes, {}, types, given=None if zero else 9)


def _gqa(heads: int, groups: int, head_dim: int) -> Case:
    return Case("GroupedQueryAttention", {"scale": 0.4}, {"H": heads, "G": groups, "D": head_dim})


CASES = [
    *(Case("RotaryEmbedding", {"interleaved": i}, {"H": 3, "D": d, "d": d // 2}) for i in (0, 1) for d in (2, 6, 8)),
    *(Case("RollingKVWrite", {}, {"G": 2, "S": s, "D": 3}) for s in (1, 2, 3, 8)),
    Case("RollingKVWrite", {}, {"G": 1, "D": 4}),
    *(_gqa(*sizes) for sizes in ((4, 4, 8), (4, 2, 6), (4, 1, 8), (6, 3, 2))),
    *(Case("SlidingWindowAttention", {"scale": 0.6, "window": w}, {}) for w in (0, 1, 2, 3, 5, 8, 33)),
    *(Case("MoEGate", {"top_k": k}, {"E": e}) for e, k in ((4, 1), (4, 2), (8, 3), (8, 8), (1, 1))),
    *(Case("MixtureOfExperts", {"activation": name}, {"E": 4, "K": 2}) for name in sorted(ACTIVATIONS)),
    *(Case("MixtureOfExperts", {"activation": "silu"}, {"E": e, "K": k}) for e, k in ((1, 1), (4, 1), (4, 3), (8, 3))),
    *(Case("GatedActivation", {"activation": name}, {"N": 0, "I": 0}) for name in sorted(ACTIVATIONS)),
    Case("GatedActivation", {"activation": "silu"}, {"B": 0, "T": 0, "I": 0}),
    *(
        Case("MixtureOfExperts", {"activation": name}, {"E": 4, "K": 2}, dict.fromkeys(_STACKS, kind))
        for name in ("silu", "relu2")
        for kind in (BF16, F16)
    ),
    *(Case("RMSNorm", {"epsilon": e}, {"C": c}) for e, c in ((1e-5, 6), (1e-30, 1), (1.0, 64))),
    *(Case("StoredMatMul", {}, {"N": 5, "K": 12}, {"weight_NK": kind}) for kind in (ir.DataType.FLOAT, BF16, F16)),
    Case("StoredMatMul", {}, {"N": 1, "K": 1}),
    *(_rolling(window, i) for window in (0, 1, 2, 5, 33) for i in (0, 1)),
    *(_rolling(window, i, kind) for window, i in ((0, 1), (1, 0), (5, 0), (5, 1)) for kind in (F16, I8)),
    *(_packed(window, i) for window in (0, 1, 5) for i in (0, 1)),
    _packed(5, 0, F16),
    *(_quantized(40, 5, bits, 16, zero) for bits in (4, 8) for zero in (False, True)),
    *(_quantized(64, 3, bits, 32, zero, F16) for bits in (4, 8) for zero in (False, True)),
    _quantized(16, 1, 4, 128, True),
    *(_quantized_experts(bits, 16, zero, "relu", kind) for bits, zero, kind in ((4, False, F16), (8, True, F16))),
    *(_quantized_experts(bits, 32, True, "silu", ir.DataType.FLOAT) for bits in (4, 8)),
]


def model_of(case: Case) -> ir.Model:
    """A model that is one node of the op, with its function bodies.

    What numpy has no type for comes as float32 and is cast.
    """
    op = OPS[case.op]

    def value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    inputs, fed, casts = [], [], []
    leading = ["rows", "tokens"] if op.rows else []
    for place, (name, shape) in enumerate(zip(case.inputs, case.shapes, strict=True)):
        due = case.dtype(name)
        if op.imports:  # R and B are those of each matrix
            shape = tuple(extent if isinstance(extent, int) else f"{name}_{extent}" for extent in shape)
        given = value(name, ir.DataType.FLOAT if due == BF16 else due, [*leading, *shape] if place == 0 else shape)
        inputs.append(given)
        if due == BF16:
            casts.append(ir.node("Cast", [given], {"to": int(BF16)}))
            given = casts[-1].outputs[0]
        fed.append(given)
    axes = {name: case.shapes[0] if op.pointwise else name.rpartition("_")[2] for name in op.outputs}
    outputs = [
        value(name, case.dtype(name), [*leading, *(f"{name}_{axis}" for axis in axes[name])]) for name in op.outputs
    ]
    node = op.node(fed, case.attributes, outputs)
    graph = ir.Graph(inputs, outputs, nodes=[*casts, node], opset_imports={"": OPSET}, name="alone")
    model = ir.Model(graph, ir_version=11)
    for function in op.functions(case.attributes):
        declare(model, function)
    return model


def _coarse(array: Any) -> Any:
    """Multiples of 1/16: products and sums of a few of them are exact in float32, and so is what is stored of them."""
    return np.round(array * 16) / np.float32(16) if array.dtype == np.float32 else array


def of_127ths(x: Any, block: int) -> Any:
    """Multiples of 2⁻¹⁰ with ±127 in every block: who rounds activations to 8 bits takes them whole."""
    numbers = np.clip(np.round(x * 40), -126, 126)
    numbers[..., ::block] = 127 * np.where(numbers[..., ::block] < 0, -1, 1)
    return (numbers / 1024).astype(np.float32)


def examples_of(case: Case) -> Iterator[Arrays]:
    """The op's own examples, in the case's types, and such that no rounding is left to the implementation."""
    op, shapes = OPS[case.op], case.shapes
    if op.rows:
        shapes = [("rows", "tokens", *shapes[0]), *shapes[1:]]
    for arrays in op.examples(np.random.default_rng(1), case.attributes, shapes):
        feeds = dict(zip(case.inputs, arrays[: len(case.inputs)], strict=True))
        if any(case.dtype(name) in (F16, I8) for name in _RINGS):
            feeds = {name: _coarse(array) for name, array in feeds.items()}
        if case.op.startswith("Quantized"):
            first = case.inputs[0]
            feeds[first] = of_127ths(feeds[first], int(case.attributes["block_size"]))
        if case.op == "QuantizedMatMul":
            feeds["x_K"] = feeds["x_K"][:, None]
        yield {name: _rounded(array, case.dtype(name)) for name, array in feeds.items()}


def _rounded(array: Any, dtype: ir.DataType) -> Any:
    """An array of the type; of bfloat16 the float32 numbers that it holds."""
    if dtype == BF16:
        return array.astype(dtype.numpy()).astype(np.float32)
    return array.astype(dtype.numpy())
