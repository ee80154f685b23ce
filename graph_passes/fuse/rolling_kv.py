"""Ring write: ScatterElements into a ring at position mod S, padding written back, becomes one node.

Right because the scatter runs over the slot axis of a rank-4 buffer, its updates are the new values where a mask holds
and the buffer's own values elsewhere, and because the proof finds slots and mask equal to the op's on every border.
Which inputs are start and count is read off the data: the slots depend on one value, the mask on the other.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import Refusal, data_leaves, dims, integer_attribute, made_by, operand, refuse_reduction
from graph_passes.ops.rolling_kv import ROLLING_KV_WRITE


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the ScatterElements back to ring, chunk, start and count."""
    ring, slot, update = operand(anchor, 0), operand(anchor, 1), operand(anchor, 2)
    if len(dims(ring)) != 4 or integer_attribute(anchor, "axis", 0) != 2:
        raise Refusal("not a scatter over the slot axis of a [B, G, S, D] buffer", anchor)
    refuse_reduction(anchor)
    choice = made_by(update, "Where")
    valid, new, kept = operand(choice, 0), operand(choice, 1), operand(choice, 2)
    gather = made_by(kept, "GatherElements")
    if operand(gather, 0) is not ring or operand(gather, 1) is not slot or integer_attribute(gather, "axis", 0) != 2:
        raise Refusal("padding is not given back what its own slot holds", gather)
    start = _one_row_vector(slot, "the slots")
    count = _one_row_vector(valid, "the padding mask")
    if start is count:
        raise Refusal(f"slots and padding mask both depend on {start.name!r}", choice)
    return Match("rolling_kv", ROLLING_KV_WRITE, anchor, (ring, new, start, count), {}, (anchor.outputs[0],))


def _one_row_vector(value: ir.Value, what: str) -> ir.Value:
    """The only int64 [B] value that `value` is computed from."""
    leaves = data_leaves(value)
    if len(leaves) != 1 or leaves[0].dtype != ir.DataType.INT64 or len(dims(leaves[0])) != 1:
        names = ", ".join(repr(leaf.name) for leaf in leaves) or "nothing"
        raise Refusal(f"{what} should depend on one int64 [B] value, but depend on {names}", value.producer())
    return leaves[0]


RULE = Rule("rolling_kv", ROLLING_KV_WRITE, frozenset({("", "ScatterElements")}), match)
