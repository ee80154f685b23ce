"""Rolling attention: the turning, writing and attending nodes of a layer become one.

Right because it is what the op's body says: both rotations with the same angles, both writes and the attention with the
same rows, the attention over the two rings just written. The layout of queries, keys and values changes to that of the
projections, so that their Transposes go.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Adapted, Match, Operand, Rule
from graph_passes.graph import Refusal, dims, is_made_by, made_by, operand, permutation, sole_consumer
from graph_passes.ops.base import DOMAIN
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION
from graph_passes.ops.rolling_kv import ROLLING_KV_WRITE
from graph_passes.ops.rotary_embedding import ROTARY_EMBEDDING
from graph_passes.ops.sliding_window_attention import SLIDING_WINDOW_ATTENTION

_TURN = (0, 2, 1, 3)
"""The order that exchanges tokens and heads, and is its own way back."""


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the SlidingWindowAttention node back to what each of its inputs was before it was turned or written."""
    start, count = operand(anchor, 3), operand(anchor, 4)
    query_turn = _plugin(operand(anchor, 0), ROTARY_EMBEDDING.name)
    key_write = _plugin(operand(anchor, 1), ROLLING_KV_WRITE.name)
    value_write = _plugin(operand(anchor, 2), ROLLING_KV_WRITE.name)
    key_turn = _plugin(operand(key_write, 1), ROTARY_EMBEDDING.name)
    for write in (key_write, value_write):
        if operand(write, 2) is not start or operand(write, 3) is not count:
            raise Refusal("the ring is written at other positions than are attended to", write)
        if not write.outputs[0].is_graph_output():
            raise Refusal("the written ring does not leave the graph", write)
    cos, sin = operand(query_turn, 1), operand(query_turn, 2)
    interleaved = query_turn.attributes["interleaved"].as_int()
    if operand(key_turn, 1) is not cos or operand(key_turn, 2) is not sin:
        raise Refusal("keys are turned by other angles than queries", key_turn)
    if key_turn.attributes["interleaved"].as_int() != interleaved:
        raise Refusal("keys are turned in other pairs than queries", key_turn)
    back = sole_consumer(anchor.outputs[0], "Transpose")
    if tuple(permutation(back)) != _TURN:
        raise Refusal("what was attended to is not brought back into the order of tokens and heads", back)
    new = (operand(query_turn, 0), operand(key_turn, 0), operand(value_write, 1))
    return Match(
        "rolling_attention",
        ROLLING_ATTENTION,
        anchor,
        (*map(_tokens_first, new), cos, sin, operand(key_write, 0), operand(value_write, 0), start, count),
        {
            "scale": float(anchor.attributes["scale"].as_float()),
            "window": anchor.attributes["window"].as_int(),
            "interleaved": interleaved,
        },
        (back.outputs[0], key_write.outputs[0], value_write.outputs[0]),
    )


def _plugin(value: ir.Value, op: str) -> ir.Node:
    node = value.producer()
    if node is None or (node.domain, node.op_type) != (DOMAIN, op):
        found = "a graph input or weight" if node is None else node.op_type
        raise Refusal(f"{value.name!r} should come from {op}, but comes from {found}", node)
    return node


def _tokens_first(value: ir.Value) -> Operand:
    """[B, T, heads, D] of a value [B, heads, T, D]: what it was turned from, or itself turned."""
    if is_made_by(value, "Transpose"):
        turn = made_by(value, "Transpose")
        if tuple(permutation(turn)) == _TURN:
            return operand(turn, 0)
    B, heads, T, D = dims(value)
    return Adapted(
        value,
        value.dtype or ir.DataType.FLOAT,
        (B, T, heads, D),
        lambda source: [ir.node("Transpose", [source], {"perm": list(_TURN)})],
        lambda array: array.transpose(_TURN),
        "transposed",
    )


RULE = Rule(
    "rolling_attention", ROLLING_ATTENTION, frozenset({(DOMAIN, SLIDING_WINDOW_ATTENTION.name)}), match
)
