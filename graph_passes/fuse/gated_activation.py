"""Gated activation: act(gate) · up between the projections of a feed-forward layer becomes one node.

Right because an elementwise function of one product, times another product, is the op's definition; which function it
is, is found by running it. docs/write_a_fusion.md builds this file step by step.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.fuse.activation import activation_between
from graph_passes.graph import Refusal, is_made_by, made_by, operand
from graph_passes.ops.gated_activation import GATED_ACTIVATION

_PRODUCTS = ("MatMul", "Gemm")


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the Mul back to the two products, one of them behind an activation."""
    left, right = operand(anchor, 0), operand(anchor, 1)
    for active, up in ((left, right), (right, left)):
        if not _is_product(up) or _is_product(active):
            continue
        gate = _behind_activation(active)
        if gate is up:
            raise Refusal("both factors come from the same product, so nothing is gated", anchor)
        activation = activation_between(model, gate, active)
        inputs, outputs = (gate, up), (anchor.outputs[0],)
        return Match("gated_activation", GATED_ACTIVATION, anchor, inputs, {"activation": activation}, outputs)
    raise Refusal("not an activated product times another product", anchor)


def _is_product(value: ir.Value) -> bool:
    """Whether `value` is a matrix product, perhaps with its axes split again."""
    while is_made_by(value, "Reshape"):
        value = operand(made_by(value, "Reshape"), 0)
    return is_made_by(value, *_PRODUCTS)


def _behind_activation(active: ir.Value) -> ir.Value:
    """The nearest product that `active` is computed from."""
    seen: set[ir.Value] = set()
    front = [active]
    while front:
        value = front.pop(0)
        if _is_product(value):
            return value
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        front.extend(v for v in node.inputs if v is not None)
    raise Refusal("there is no product behind the activation", active.producer())


RULE = Rule("gated_activation", GATED_ACTIVATION, frozenset({("", "Mul")}), match)
