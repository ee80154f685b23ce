"""Rolling attention: the turning, writing and attending nodes of a layer become one.

Right because it is what the op's body says: both rotations with the same angles, both writes and the attention with
the same rows, the attention over the two rings just written. Each ring comes from outside, leaves again and has no
other reader before it is written, so that it may stay in one place. Nothing that goes into the node may depend on what
it gives: the nodes before could be computed one after the other, and a single one could not. The layout of queries,
keys and values changes to that of the projections, so that their Transposes go.
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
        _refuse_ring(write)
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
    found = Match(
        "rolling_attention",
        ROLLING_ATTENTION,
        anchor,
        (*map(_tokens_first, new), cos, sin, operand(key_write, 0), operand(value_write, 0), start, count),
        {
            "scale": float(anchor.attributes["scale"].as_float()),
            "window": anchor.attributes["window"].as_int(),
            "interleaved": interleaved,
            "rounds": 0,
        },
        (back.outputs[0], key_write.outputs[0], value_write.outputs[0]),
    )
    _refuse_twice(found)
    _refuse_cycle(found)
    return found


def _refuse_ring(write: ir.Node) -> None:
    """Refuses a ring that could not lie in one place before and after: the node writes where it reads."""
    past = operand(write, 0)
    if not past.is_graph_input():
        raise Refusal(f"the ring {past.name!r} does not come from outside", write)
    if not write.outputs[0].is_graph_output():
        raise Refusal("the written ring does not leave the graph", write)
    others = [use.node for use in past.uses() if use.node is not write and use.node.op_type != "Shape"]
    if others:
        raise Refusal(
            f"{others[0].op_type} reads the old ring {past.name!r} as well, and may find it written", others[0]
        )


def _refuse_twice(found: Match) -> None:
    """Refuses one value in two places, such as one ring for both or keys that are the values: no proof tells them."""
    names = [str(value.name) for value in found.sources]
    for name in names:
        if names.count(name) > 1:
            places = [at for at, other in zip(found.op.inputs, names, strict=True) if other == name]
            raise Refusal(f"{name!r} is {' and '.join(places)}", found.anchor)


def _refuse_cycle(found: Match) -> None:
    """Refuses inputs that are computed from the outputs."""
    seen, stack = set(found.sources), list(found.sources)
    while stack:
        value = stack.pop()
        if value in found.outputs:
            raise Refusal(f"an input depends on {value.name!r}, which the node would give", value.producer())
        node = value.producer()
        for before in node.inputs if node is not None else ():
            if before is not None and before not in seen:
                seen.add(before)
                stack.append(before)


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


RULE = Rule("rolling_attention", ROLLING_ATTENTION, frozenset({(DOMAIN, SLIDING_WINDOW_ATTENTION.name)}), match)
