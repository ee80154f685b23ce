"""Weights that a bundle stores in few bits, as the float32 that graphs before the lowering read."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from exporter.bisect.rings import DOMAIN, declare
from exporter.recipes import PARAMETER, graft, replace_parameter
from graph_passes.lower.formats import Quantized


def read_as_float(model: ir.Model, value: ir.Value, parameter: ir.Value, reader: ir.Node) -> None:
    """Give the unbound float32 weight `value` of `model` what `parameter` of another graph holds in two bytes."""
    name, shape = str(value.name), value.shape
    stored = ir.Value(name=f"{name}.as_stored", type=parameter.type, shape=shape, const_value=value.const_value)
    model.graph.register_initializer(stored)
    made = ir.Value(name=f"{name}.wide", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[made], name=f"{name}.widen")
    cast.metadata_props[PARAMETER] = name
    replace_parameter(model, value, made, [cast], reader)
    graft(model, stored, parameter, cast)


def read_as_quantized(
    model: ir.Model, value: ir.Value, parts: Sequence[ir.Value], wanted: Quantized, reader: ir.Node
) -> None:
    """Give it what numbers, scales and perhaps zero points of another graph stand for."""
    name = str(value.name)
    op = f"Dequantize{wanted.bits}{'Zero' if wanted.zero_points else ''}"
    declare(model, _function(op, wanted))
    inputs = []
    for part in parts:
        assert part.const_value is not None
        held = ir.Value(name=part.name, type=part.type, shape=part.shape, const_value=part.const_value)
        model.graph.register_initializer(held)
        inputs.append(held)
    assert value.shape is not None
    columns = int(value.shape.numpy()[-1])
    made = ir.Value(name=f"{name}.wide", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
    node = ir.node(op, inputs, {"columns": [columns]}, domain=DOMAIN, outputs=[made], name=f"{name}.dequantize")
    node.metadata_props[PARAMETER] = name
    replace_parameter(model, value, made, [node], reader)


def _function(op: str, wanted: Quantized) -> str:
    """scale · (number − zero) by `reference.quantized_layout`, for any axes before rows R: [..., R, columns]."""
    inputs = ["packed_RBb", "scale_RB", *(["zero_RZ"] if wanted.zero_points else [])]
    middle = 1 << (wanted.bits - 1)
    zero = f"zero = Constant <value_float = {middle}.0> ()"
    if wanted.zero_points:
        zero = f"""
        {_unpacked("zero_RZ", "zeros", wanted.bits)}
        count = Shape <start = -1> (scale_RB)
        zero_RB = Slice (zeros, begin, count, last)
        zero = Unsqueeze (zero_RB, last)
        """
    return f"""{op} <columns: ints> ({", ".join(inputs)}) => (weight) {{
        last = Constant <value_ints = [-1]> ()
        begin = Constant <value_ints = [0]> ()
        all = Constant <value_ints = [-1]> ()
        end = Constant <value_ints: ints = @columns> ()
        {_unpacked("packed_RBb", "number", wanted.bits)}
        {zero}
        centred = Sub (number, zero)
        scale_wide = Cast <to = 1> (scale_RB)
        scale = Unsqueeze (scale_wide, last)
        value = Mul (centred, scale)
        rows = Shape <end = -1> (scale_RB)
        whole = Concat <axis = 0> (rows, all)
        flat = Reshape (value, whole)
        weight = Slice (flat, begin, end, last)
    }}"""


def _unpacked(packed: str, made: str, bits: int) -> str:
    """Statements: the last axis of bytes as float32 numbers; two in a byte at 4 bits, the low half first."""
    if bits == 8:
        return f"{made} = Cast <to = 1> ({packed})"
    return f"""
        {made}_mask = Constant <value = uint8 {{15}}> ()
        {made}_four = Constant <value = uint8 {{4}}> ()
        {made}_low = BitwiseAnd ({packed}, {made}_mask)
        {made}_high = BitShift <direction = "RIGHT"> ({packed}, {made}_four)
        {made}_low_1 = Unsqueeze ({made}_low, last)
        {made}_high_1 = Unsqueeze ({made}_high, last)
        {made}_pairs = Concat <axis = -1> ({made}_low_1, {made}_high_1)
        {made}_before = Shape <end = -1> ({packed})
        {made}_shape = Concat <axis = 0> ({made}_before, all)
        {made}_bytes = Reshape ({made}_pairs, {made}_shape)
        {made} = Cast <to = 1> ({made}_bytes)
        """
