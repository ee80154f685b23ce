"""What tests of lowering share: fused graphs with weights, and values for them in every format."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graph_passes.driver import apply
from graph_passes.fuse import linear, moe, rms_norm
from graph_passes.lower.formats import TYPES, LinearFormat, Quantized, Stored, packed_name, scale_name, zero_name
from graph_passes.ops.quantized_matmul import blocks, zero_bytes
from graph_passes.unbound import UnboundWeight, is_unbound
from tests.graph_passes import oracles
from tests.support.graphs import Arrays, canonical

HALVES = [Stored("BF16"), Stored("F16")]
QUANTIZED = [
    Quantized(bits, block, zero, scale)
    for bits in (4, 8)
    for block, zero, scale in ((16, False, "F16"), (16, True, "F32"), (32, True, "F16"))
]


def fused(text: str, names: Mapping[str, str]) -> ir.Model:
    """The graph with its linear layers and experts fused; names: inputs that are weights, and their names."""
    model = canonical(text, *names)
    for rule in (moe.RULE, rms_norm.RULE, linear.RULE):
        apply(model, rule)
    for old, new in names.items():
        value = model.graph.initializers.pop(old)
        assert value.shape is not None
        value.name = new
        value.const_value = UnboundWeight(new, ir.DataType.FLOAT, value.shape)
        model.graph.initializers.add(value)
    return model


def bound(model: ir.Model, values: Arrays) -> ir.Model:
    """A copy with these weights, each in the type that the graph has for it; there must be as many."""
    copy = model.clone()
    unbound = {name: value for name, value in copy.graph.initializers.items() if is_unbound(value)}
    assert unbound.keys() == values.keys()
    for name, value in unbound.items():
        assert value.dtype is not None
        assert value.shape is not None
        array = values[name].astype(value.dtype.numpy())
        assert array.shape == tuple(value.shape)
        value.const_value = ir.tensor(array, name=name)
    return copy


def weights(model: ir.Model) -> Arrays:
    """Random float32 values for the weights of a graph before lowering."""
    rng = np.random.default_rng(3)
    return {
        name: rng.standard_normal(value.shape.numpy(), dtype=np.float32)
        for name, value in model.graph.initializers.items()
        if is_unbound(value) and value.shape is not None
    }


def rounded(values: Arrays, formats: Mapping[str, LinearFormat]) -> Arrays:
    """The values that two-byte weights hold, in float32."""
    made = dict(values)
    for name, wanted in formats.items():
        assert isinstance(wanted, Stored)
        made[name] = values[name].astype(TYPES[wanted.dtype].numpy()).astype(np.float32)
    return made


def quantized(name: str, shape: tuple[int, ...], form: Quantized) -> tuple[Arrays, np.ndarray]:
    """Random numbers, scales and zero points of a parameter by their names, and what they stand for."""
    rng = np.random.default_rng([5, *name.encode()])
    *leading, K = shape
    B = blocks(K, form.block_size)
    packed = rng.integers(0, 256, (*leading, B, form.block_size * form.bits // 8), dtype=np.uint8)
    scale = (rng.random((*leading, B)) / 16).astype(np.float16 if form.scale == "F16" else np.float32)
    values: Arrays = {packed_name(name): packed, scale_name(name): scale}
    if form.zero_points:
        size = (*leading, zero_bytes(K, form.block_size, form.bits))
        values[zero_name(name)] = rng.integers(0, 256, size, dtype=np.uint8)
    wide = oracles.dequantized(packed, scale, values.get(zero_name(name)), K=K, bits=form.bits)
    return values, wide
