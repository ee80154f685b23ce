"""RMSNorm: a row times the reciprocal root of its mean square, times a weight, becomes one node.

Right because the walk finds every step of the definition between one input and the product with a weight [C], and the
proof runs them. The epsilon is the constant that is added under the root.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import Refusal, constant, dims, made_by, operand, scalar
from graph_passes.ops.rms_norm import RMS_NORM


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the product with the weight back to the row."""
    left, right = operand(anchor, 0), operand(anchor, 1)
    for weight, normed in ((left, right), (right, left)):
        if weight.producer() is None and constant(weight) is None and weight.is_initializer() and len(dims(weight)) == 1:
            break
    else:
        raise Refusal("no factor is a weight [C]", anchor)
    x, epsilon = _normalised(normed)
    inputs, outputs = (x, weight), (anchor.outputs[0],)
    return Match("rms_norm", RMS_NORM, anchor, inputs, {"epsilon": epsilon}, outputs)


def _normalised(normed: ir.Value) -> tuple[ir.Value, float]:
    """The row and the epsilon behind x · 1/√(mean(x²) + ε)."""
    product = made_by(normed, "Mul")
    left, right = operand(product, 0), operand(product, 1)
    reasons = []
    for x, inverse in ((left, right), (right, left)):
        try:
            root = made_by(operand(made_by(inverse, "Reciprocal"), 0), "Sqrt")
            shifted = made_by(operand(root, 0), "Add")
            mean, epsilon = _constant_last(shifted)
            square = made_by(operand(made_by(mean, "ReduceMean"), 0), "Pow", "Mul")
            if operand(square, 0) is not x:
                raise Refusal(f"the square is not that of {x.name!r}", square)
        except Refusal as refusal:
            reasons.append(refusal)
            continue
        return x, epsilon
    raise max(reasons, key=lambda refusal: refusal.node is not product)


def _constant_last(node: ir.Node) -> tuple[ir.Value, float]:
    for value, other in ((operand(node, 0), operand(node, 1)), (operand(node, 1), operand(node, 0))):
        number = scalar(other)
        if number is not None:
            return value, number
    raise Refusal("nothing constant is added to the mean square", node)


RULE = Rule("rms_norm", RMS_NORM, frozenset({("", "Mul")}), match)
