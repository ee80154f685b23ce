"""Grouped-query attention: softmax of masked, scaled scores over repeated heads becomes one node without the repeat.

Right because Unsqueeze → Expand → Reshape over the head axis repeats each key and value head for neighbouring query
heads, which is the op's own grouping, and because scores where the mask is false are so low that their weight is zero.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import (
    Refusal,
    dims,
    integer_attribute,
    integers,
    is_made_by,
    made_by,
    operand,
    permutation,
    scalar,
    sole_consumer,
    static_dim,
)
from graph_passes.ops.grouped_query_attention import GROUPED_QUERY_ATTENTION

_NEVER = -1e30
"""A score at or below this is masked: exp of it, less any ordinary maximum, is exactly zero in float32."""


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the Softmax back to query, key, mask and scale, and forward to the product with the values."""
    if len(dims(anchor.outputs[0])) != 4 or integer_attribute(anchor, "axis", -1) not in (3, -1):
        raise Refusal("not a softmax over the last of four axes", anchor)
    choice = made_by(operand(anchor, 0), "Where")
    visible, lowest = operand(choice, 0), scalar(operand(choice, 2))
    if lowest is None or lowest > _NEVER:
        raise Refusal(f"masked scores are {lowest}, which leaves them some weight", choice)
    if visible.dtype != ir.DataType.BOOL or len(dims(visible)) != 4 or dims(visible)[1] != 1:
        raise Refusal("the mask is not bool [B, 1, T, S]", choice)
    scores, scale = _strip_scale(operand(choice, 1))
    product = made_by(scores, "MatMul")
    query = operand(product, 0)
    transpose = made_by(operand(product, 1), "Transpose")
    if permutation(transpose) != [0, 1, 3, 2]:
        raise Refusal("keys are not transposed over their last two axes", transpose)
    heads = static_dim(query, 1)
    key = _unrepeat(operand(transpose, 0), heads)
    mixing = sole_consumer(anchor.outputs[0], "MatMul")
    if operand(mixing, 0) is not anchor.outputs[0]:
        raise Refusal("the attention weights are not the left factor", mixing)
    value = _unrepeat(operand(mixing, 1), heads)
    if dims(key)[1] != dims(value)[1]:
        raise Refusal(f"keys have {dims(key)[1]} heads and values {dims(value)[1]}", mixing)
    return Match(
        "gqa",
        GROUPED_QUERY_ATTENTION,
        anchor,
        (query, key, value, visible),
        {"scale": scale},
        (mixing.outputs[0],),
    )


def _strip_scale(value: ir.Value) -> tuple[ir.Value, float]:
    """The value behind constant factors, and their product."""
    scale = 1.0
    while is_made_by(value, "Mul", "Div"):
        node = made_by(value, "Mul", "Div")
        left, right = operand(node, 0), operand(node, 1)
        if (factor := scalar(right)) is not None:
            scale = scale * factor if node.op_type == "Mul" else scale / factor
            value = left
        elif node.op_type == "Mul" and (factor := scalar(left)) is not None:
            scale, value = scale * factor, right
        else:
            break
    return value, scale


def _unrepeat(value: ir.Value, heads: int) -> ir.Value:
    """The [B, G, S, D] value behind a repeat to `heads` heads, or the value itself when there is none."""
    if not is_made_by(value, "Reshape"):
        found = static_dim(value, 1)
        if found != heads:
            raise Refusal(f"{value.name!r} has {found} heads where the query has {heads}", value.producer())
        return value
    reshape = made_by(value, "Reshape")
    expand = made_by(operand(reshape, 0), "Expand")
    unsqueeze = made_by(operand(expand, 0), "Unsqueeze")
    source = operand(unsqueeze, 0)
    wide = dims(expand.outputs[0])
    if integers(operand(unsqueeze, 1)) != [2] or len(dims(source)) != 4 or len(wide) != 5:
        raise Refusal("heads are not repeated on an axis of their own behind the head axis", unsqueeze)
    groups = static_dim(source, 1)
    if static_dim(value, 1) != heads or wide[2] != heads // groups or groups * (heads // groups) != heads:
        raise Refusal(f"{groups} heads repeated {wide[2]} times do not serve {heads} query heads", reshape)
    return source


RULE = Rule("gqa", GROUPED_QUERY_ATTENTION, frozenset({("", "Softmax")}), match)
