"""MoE gate: softmax over the experts, the K best, divided by their sum, becomes one node.

Right because the same values feed the sum and the division, and because TopK breaks ties towards the lower expert, as
the op does. The form that takes the K best logits first and the softmax after is the same function, since softmax
keeps the order and the sum over all experts cancels; it has the same node.
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
    sole_consumer,
    static_dim,
)
from graph_passes.ops.moe_gate import MOE_GATE


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the TopK back to the router's logits and forward to the renormalised weights."""
    k = integers(operand(anchor, 1))
    if k is None or len(k) != 1:
        raise Refusal("the number of experts per token is not a constant", anchor)
    if not integer_attribute(anchor, "largest", 1):
        raise Refusal("TopK takes the smallest probabilities", anchor)
    best, expert = anchor.outputs
    if is_made_by(operand(anchor, 0), "Softmax"):
        softmax = made_by(operand(anchor, 0), "Softmax")
        logits, weight = operand(softmax, 0), _renormalisation(best, anchor).outputs[0]
    else:
        softmax = sole_consumer(best, "Softmax")
        logits, weight = operand(anchor, 0), softmax.outputs[0]
    for node in (anchor, softmax):
        if len(dims(logits)) != 2 or integer_attribute(node, "axis", -1) not in (1, -1):
            raise Refusal(f"the {node.op_type} does not run over the experts of [N, E] logits", node)
    if not 1 <= k[0] <= static_dim(logits, 1):
        raise Refusal(f"{k[0]} of {static_dim(logits, 1)} experts", anchor)
    return Match("moe_gate", MOE_GATE, anchor, (logits,), {"top_k": k[0]}, (weight, expert))


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
    if readers != {divisions[0], total} or best.is_graph_output():
        raise Refusal("the unnormalised probabilities are read elsewhere too", anchor)
    return divisions[0]


RULE = Rule("moe_gate", MOE_GATE, frozenset({("", "TopK")}), match)
