"""Recognises an elementwise activation by running it over a grid of points, not by its spelling."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from graph_passes.fuse.walk import cone
from graph_passes.graph import Refusal, data_leaves, dims, is_made_by
from graph_passes.ops.activations import ACTIVATIONS, activation_body
from graph_passes.ops.base import OPSET
from graph_passes.region import IR_VERSION, Region, session

_FAR = np.geomspace(10, 1e12, 48, dtype=np.float32)
_POINTS = np.concatenate([-_FAR[::-1], np.linspace(-9, 9, 1710, dtype=np.float32), _FAR])
"""Points at which two activations are told apart; the closest pair, gelu and its tanh form, differ by 4.7e-4. Beyond
the bend they reach far, since an activation may be cut off at a value that only few gates attain.
"""

_SHAPES = {1: (1806,), 2: (21, 86), 3: (3, 7, 86), 4: (3, 7, 2, 43)}
"""Axes of different extents, so that what sums or turns axes is not taken for an elementwise function."""

_SAME_ACTIVATION = 2e-6
"""Largest difference of two spellings of one activation on the grid, relative to the larger of gate, result and 1: a
few float32 roundings.
"""

_ELEMENTWISE = frozenset(
    {"Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Swish", "Exp", "Pow", "Softplus", "Softsign", "HardSigmoid"}
    | {"HardSwish", "Elu", "LeakyRelu", "Mish", "Celu", "Selu", "PRelu", "ThresholdedRelu", "Abs", "Sign", "Sqrt"}
    | {"Log", "Reciprocal", "Clip", "Max", "Min", "Mul", "Add", "Sub", "Div", "Neg", "Sum", "Where"}
    | {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Not", "And", "Or", "Sin", "Cos"}
    | {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose"}
)
"""Operators that an activation may be made of: what they do to an element depends on no size, and on no place."""


def activation_between(model: ir.Model, source: ir.Value, active: ir.Value) -> str:
    """The name in ACTIVATIONS of the elementwise function that leads from `source` to `active`.

    Raises Refusal when it depends on anything else, is not elementwise, or is none that is known.
    """
    if data_leaves(active, [source]) != [source]:
        raise Refusal("the activation depends on more than the gate", active.producer())
    for end in cone(active, _ELEMENTWISE, stop=lambda value: value is source).ends:
        if end is not source and not is_made_by(end, "ConstantOfShape"):
            node = end.producer()
            found = node.op_type if node is not None else "an input"
            raise Refusal(f"the activation is not elementwise: {end.name!r} comes from {found}", node)
    rank = len(dims(source))
    if rank not in _SHAPES:
        raise Refusal(
            f"the gate {source.name!r} has {rank} axes, where 1 to {max(_SHAPES)} are needed", active.producer()
        )
    grid = _POINTS.reshape(_SHAPES[rank])
    got = Region(model, [source], [active]).run([grid])[0]
    if got.shape != grid.shape:
        raise Refusal("the activation is not elementwise", active.producer())
    gaps = {name: _gap(np.asarray(got, np.float32).reshape(-1), _on_the_grid(name)) for name in ACTIVATIONS}
    best = min(gaps, key=lambda name: gaps[name])
    if not gaps[best] <= _SAME_ACTIVATION:
        nearest = f"the nearest, {best}, differs by {gaps[best]:.1e}"
        raise Refusal(f"the activation is none that is known; {nearest}", active.producer())
    return best


def _gap(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> float:
    """Largest difference, relative to the larger of gate, result and 1; infinite when one is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    scale = np.maximum(np.maximum(np.abs(_POINTS), np.abs(want)), 1)
    return float((np.abs(got - want) / scale).max())


@functools.cache
def _on_the_grid(name: str) -> npt.NDArray[np.float32]:
    """The activation of that name at the points, by the ops' own statements."""
    text = (
        f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>\n'
        f"activation (float[I] gate) => (float[I] active) {{ {activation_body(name, 'gate', 'active')} }}"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    return np.asarray(session(model).run(None, {"gate": _POINTS})[0])
