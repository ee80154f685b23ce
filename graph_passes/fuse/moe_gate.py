"""MoE gate: softmax over the experts, the K best, divided by their sum, becomes one node.

Right because the same values feed the sum and the division, and because TopK breaks ties towards the lower expert, as
the op does. The form that takes the K best first and the softmax after is the same function and has the same node.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import Refusal, dims, integer_attribute, integers, made_by, operand, static_dim
from graph_passes.ops import MOE_GATE


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the TopK back to the router's logits and forward to the renormalised weights."""
    k = integers(operand(anchor, 1))
    if k is None or len(k) != 1:
        raise Refusal("the number of experts per token is not a constant", anchor)
    if not integer_attribute(anchor, "largest", 1):
        raise Refusal("TopK takes the smallest probabilities", anchor)
    softmax = made_by(operand(anchor, 0), "Softmax")
    logits = operand(softmax, 0)
    if len(dims(logits)) != 2 or integer_attribute(softmax, "axis", -1) not in (1, -1):
        raise Refusal("the softmax does not run over the experts of [N, E] logits", softmax)
    if not 1 <= k[0] <= static_dim(logits, 1):
        raise Refusal(f"{k[0]} of {static_dim(logits, 1)} experts", anchor)
    best, expert = anchor.outputs
    division = _renormalisation(best, anchor)
    return Match(
        "moe_gate", MOE_GATE, anchor, (logits,), {"top_k": k[0]}, (division.outputs[0], expert)
    )


def _renormalisation(best: ir.Value, anchor: ir.Node) -> ir.Node:
    """The Div of the best probabilities by their own sum, which must be all that reads them."""
    readers = {use.node for use in best.uses()}
    divisions = [node for node in readers if node.op_type == "Div" and node.inputs[0] is best]
    if len(divisions) != 1:
        raise Refusal("the best probabilities are not renormalised by one division", anchor)
    total = made_by(operand(divisions[0], 1), "ReduceSum")
    axes = integers(operand(total, 1))
    if operand(total, 0) is not best or axes not in ([1], [-1]) or not integer_attribute(total, "keepdims", 1):
        raise Refusal("the divisor is not the sum of the best probabilities", total)
    if readers != {divisions[0], total}:
        raise Refusal("the unnormalised probabilities are read elsewhere too", anchor)
    return divisions[0]


RULE = Rule("moe_gate", MOE_GATE, frozenset({("", "TopK")}), match)
