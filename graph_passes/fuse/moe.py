"""Experts: every expert on every token, times scattered weights, summed over the experts, becomes one node.

Right because an expert that a token did not choose has weight zero there, so that only the chosen ones add to the sum.
The activation between gate and up is recognised by running it over a grid of points, not by its spelling.
"""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import (
    Refusal,
    constant,
    data_leaves,
    dims,
    integer_attribute,
    integers,
    is_made_by,
    made_by,
    operand,
    permutation,
    refuse_reduction,
)
from graph_passes.ops.base import OPSET
from graph_passes.ops.moe import ACTIVATIONS, MIXTURE_OF_EXPERTS
from graph_passes.region import IR_VERSION, Region, session

_GRID = np.linspace(-9, 9, 1806, dtype=np.float32).reshape(3, 7, 86)
"""Points at which two activations are told apart; the closest pair, gelu and its tanh form, differ by 4.7e-4.

Three axes of different extents, so that what sums or turns axes is not taken for an elementwise function.
"""

_SAME_ACTIVATION = 2e-6
"""Largest difference of two spellings of one activation on the grid: a few float32 roundings of values up to 9."""


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the sum over experts back to tokens, weights, expert numbers and the three stacks of matrices."""
    if integers(operand(anchor, 1)) != [0] or integer_attribute(anchor, "keepdims", 1):
        raise Refusal("not a sum over the expert axis", anchor)
    weighted = made_by(operand(anchor, 0), "Mul")
    out, weight, expert = _out_and_choice(weighted)
    gated, down = _times_transposed(out)
    product = made_by(gated, "Mul")
    x, activation, gate, up = _gate_and_up(model, product)
    return Match(
        "moe",
        MIXTURE_OF_EXPERTS,
        anchor,
        (x, weight, expert, gate, up, down),
        {"activation": activation},
        (anchor.outputs[0],),
    )


def _out_and_choice(weighted: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(expert outputs [E, N, C], weight [N, K], expert [N, K]) of the weighting product."""
    for out, factor in (tuple(weighted.inputs), tuple(reversed(weighted.inputs))):
        assert out is not None
        if not is_made_by(out, "MatMul") or not is_made_by(factor, "Unsqueeze"):
            continue
        unsqueeze = made_by(factor, "Unsqueeze")
        transpose = made_by(operand(unsqueeze, 0), "Transpose")
        scatter = made_by(operand(transpose, 0), "ScatterElements")
        laid_out = integers(operand(unsqueeze, 1)) == [2] and permutation(transpose) == [1, 0]
        if not laid_out or integer_attribute(scatter, "axis", 0) != 1:
            raise Refusal("the weights are not laid out as [E, N, 1]", unsqueeze)
        refuse_reduction(scatter)
        if not _is_zero(operand(scatter, 0)):
            raise Refusal("experts that were not chosen have a weight other than zero", scatter)
        return out, operand(scatter, 2), operand(scatter, 1)
    raise Refusal("not expert outputs times a [E, N, 1] weight", weighted)


def _is_zero(value: ir.Value) -> bool:
    """Whether a constant, or what Expand or ConstantOfShape fills, is all zeros."""
    data = constant(value)
    if data is None:
        node = made_by(value, "Expand", "ConstantOfShape")
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            return fill is None or not np.asarray(fill.as_tensor().numpy()).any()
        data = constant(operand(node, 0))
    return data is not None and not data.any()


def _times_transposed(value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(left factor, matrices [E, out, in]) of a product with matrices transposed over their last two axes."""
    product = made_by(value, "MatMul")
    transpose = made_by(operand(product, 1), "Transpose")
    if permutation(transpose) != [0, 2, 1]:
        raise Refusal("the experts' matrices are not transposed over their last two axes", transpose)
    return operand(product, 0), operand(transpose, 0)


def _gate_and_up(model: ir.Model, product: ir.Node) -> tuple[ir.Value, str, ir.Value, ir.Value]:
    """(tokens, activation, gate matrices, up matrices) of act(x·gate) · (x·up), whichever factor is the activated."""
    left, right = operand(product, 0), operand(product, 1)
    for active, plain in ((left, right), (right, left)):
        if not is_made_by(plain, "MatMul") or is_made_by(active, "MatMul"):
            continue
        x, up = _times_transposed(plain)
        source = _activated_source(active)
        other, gate = _times_transposed(source)
        if other is not x or len(dims(x)) != 2:
            raise Refusal("gate and up do not read the same [N, C] tokens", product)
        return x, _activation(model, source, active), gate, up
    raise Refusal("not act(x·gate) · (x·up)", product)


def _activated_source(active: ir.Value) -> ir.Value:
    """The MatMul result that `active` is an elementwise function of."""
    seen, stack = set(), [active]
    while stack:
        value = stack.pop()
        if is_made_by(value, "MatMul"):
            return value
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        stack.extend(v for v in node.inputs if v is not None)
    raise Refusal("no product with the gate matrices behind the activation", active.producer())


def _activation(model: ir.Model, source: ir.Value, active: ir.Value) -> str:
    """The name in ACTIVATIONS whose values the region from `source` to `active` has on the grid."""
    if data_leaves(active, [source]) != [source]:
        raise Refusal("the activation depends on more than the gate", active.producer())
    got = Region(model, [source], [active]).run([_GRID])[0]
    if got.shape != _GRID.shape:
        raise Refusal("the activation is not elementwise", active.producer())
    gaps = {name: float(np.abs(got - _reference(name)).max()) for name in ACTIVATIONS}
    best = min(gaps, key=lambda name: gaps[name])
    if not gaps[best] <= _SAME_ACTIVATION:
        nearest = f"the nearest, {best}, differs by {gaps[best]:.1e}"
        raise Refusal(f"the activation is none that is known; {nearest}", active.producer())
    return best


def _reference(name: str) -> np.ndarray:
    """The activation of that name on the grid, by the op's own statements."""
    text = (
        f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>\n'
        f"activation (float[E, N, I] gate_ENI) => (float[E, N, I] active_ENI) {{ {ACTIVATIONS[name]} }}"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    return np.asarray(session(model).run(None, {"gate_ENI": _GRID})[0])


RULE = Rule("moe", MIXTURE_OF_EXPERTS, frozenset({("", "ReduceSum")}), match)
