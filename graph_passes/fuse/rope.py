"""Rotary embedding: low·cos − high·sin beside high·cos + low·sin becomes one node.

Right because the two halves of the last axis are each read whole, the same cosine and sine values serve both, and the
result is joined in the same order. cos and sin reach the node before they were widened over the heads.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import Refusal, dims, integer_attribute, integers, made_by, operand
from graph_passes.ops.rotary_embedding import ROTARY_EMBEDDING


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the Concat of the two turned halves back to x, cos and sin."""
    if len(anchor.inputs) != 2 or integer_attribute(anchor, "axis", 0) != 3:
        raise Refusal("not a Concat of two halves along the last of four axes", anchor)
    minus, plus = made_by(operand(anchor, 0), "Sub"), made_by(operand(anchor, 1), "Add")
    low, cos = _half_times(operand(minus, 0))
    high, sin = _half_times(operand(minus, 1))
    terms = {_half_times(operand(plus, 0)), _half_times(operand(plus, 1))}
    if terms != {(high, cos), (low, sin)}:
        raise Refusal("the second half is not high·cos + low·sin of the same values", plus)
    x, low_start, low_end = _half(low)
    other, high_start, high_end = _half(high)
    shape = dims(x)
    if x is not other or len(shape) != 4 or not isinstance(shape[3], int) or shape[3] % 2:
        raise Refusal("the halves are not those of one value with an even head dim", low.producer())
    half = shape[3] // 2
    if (low_start, low_end, high_start, min(high_end, shape[3])) != (0, half, half, shape[3]):
        raise Refusal(f"the halves are [{low_start}:{low_end}] and [{high_start}:{high_end}] of {shape[3]}", anchor)
    angles = _per_head(cos, half), _per_head(sin, half)
    return Match("rope", ROTARY_EMBEDDING, anchor, (x, *angles), {"interleaved": 0}, (anchor.outputs[0],))


def _half_times(value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(half of x, cosine or sine) of a product, in that order whichever way it is written."""
    product = made_by(value, "Mul")
    a, b = operand(product, 0), operand(product, 1)
    for half, factor in ((a, b), (b, a)):
        producer = half.producer()
        if producer is not None and producer.op_type == "Slice":
            return half, factor
    raise Refusal("neither factor is a slice of x", product)


def _half(value: ir.Value) -> tuple[ir.Value, int, int]:
    """(x, start, end) of a Slice over the last axis with step one."""
    node = made_by(value, "Slice")
    start, end, axis = (integers(operand(node, i)) for i in (1, 2, 3))
    step = integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if start is None or end is None or axis is None or step != [1] or axis not in ([3], [-1]):
        raise Refusal("not a slice with constant bounds over the last axis", node)
    return operand(node, 0), start[0], end[0]


def _per_head(value: ir.Value, half: int) -> ir.Value:
    """cos or sin [B, T, d] behind the Unsqueeze that lets it broadcast over heads."""
    node = made_by(value, "Unsqueeze")
    source = operand(node, 0)
    if integers(operand(node, 1)) != [1] or len(dims(source)) != 3 or dims(source)[2] != half:
        raise Refusal(f"cosine and sine are not [B, T, {half}] broadcast over the heads", node)
    return source


RULE = Rule("rope", ROTARY_EMBEDDING, frozenset({("", "Concat")}), match)
