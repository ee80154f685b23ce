"""RMSNorm: a row times the reciprocal root of its mean square, times a weight, becomes one node.

Right because the walk finds every step of the definition between one input and the product with a weight [C], the mean
over the last axis alone among them, and the proof runs them. The epsilon is the constant that is added under the root.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import (
    Refusal,
    constant,
    dims,
    integer_attribute,
    integers,
    is_made_by,
    made_by,
    operand,
    scalar,
)
from graph_passes.ops.rms_norm import RMS_NORM


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the product with the weight back to the row."""
    factors = operand(anchor, 0), operand(anchor, 1)
    weights = [factor for factor in factors if _is_weight(factor)]
    if len(weights) != 1:
        raise Refusal("not one factor is a weight [C]", anchor)
    (normed,) = (factor for factor in factors if factor is not weights[0])
    x, epsilon = _normalised(normed)
    inputs, outputs = (x, weights[0]), (anchor.outputs[0],)
    return Match("rms_norm", RMS_NORM, anchor, inputs, {"epsilon": epsilon}, outputs)


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and constant(value) is None and len(dims(value)) == 1


def _normalised(normed: ir.Value) -> tuple[ir.Value, float]:
    """The row and the epsilon behind x · 1/√(mean(x²) + ε) or x / √(mean(x²) + ε)."""
    product = made_by(normed, "Mul", "Div")
    left, right = operand(product, 0), operand(product, 1)
    if product.op_type == "Div":
        return left, _epsilon(right, left)
    reasons = []
    for x, inverse in ((left, right), (right, left)):
        try:
            return x, _epsilon(operand(made_by(inverse, "Reciprocal"), 0), x)
        except Refusal as refusal:
            reasons.append(refusal)
    # Of a factor that is a reciprocal the reason is why it is not the right one.
    raise max(zip((right, left), reasons, strict=True), key=lambda pair: is_made_by(pair[0], "Reciprocal"))[1]


def _epsilon(root: ir.Value, x: ir.Value) -> float:
    """ε of √(mean(x²) + ε), the mean over the last axis, which stays."""
    shifted = made_by(operand(made_by(root, "Sqrt"), 0), "Add")
    mean, epsilon = _constant_last(shifted)
    if not epsilon > 0:
        raise Refusal(f"{epsilon:g} is added to the mean square, so that a row of zeros has no norm", shifted)
    reduction = made_by(mean, "ReduceMean")
    square = operand(reduction, 0)
    if integers(operand(reduction, 1)) not in ([-1], [len(dims(square)) - 1]):
        raise Refusal("the mean is not taken over the last axis alone", reduction)
    if integer_attribute(reduction, "keepdims", 1) != 1:
        raise Refusal("the mean square has lost its last axis, so that it meets other rows", reduction)
    squared = made_by(square, "Pow", "Mul")
    if operand(squared, 0) is not x:
        raise Refusal(f"the mean is not that of the squares of {x.name!r}", squared)
    if operand(squared, 1) is not x if squared.op_type == "Mul" else scalar(operand(squared, 1)) != 2:
        raise Refusal(f"{x.name!r} is not squared", squared)
    return epsilon


def _constant_last(node: ir.Node) -> tuple[ir.Value, float]:
    for value, other in ((operand(node, 0), operand(node, 1)), (operand(node, 1), operand(node, 0))):
        number = scalar(other)
        if number is not None:
            return value, number
    raise Refusal("nothing constant is added to the mean square", node)


RULE = Rule("rms_norm", RMS_NORM, frozenset({("", "Mul")}), match)
