"""Recognises an elementwise activation by running it over a grid of points, not by its spelling."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from graph_passes.graph import Refusal, data_leaves
from graph_passes.ops.activations import ACTIVATIONS, activation_body
from graph_passes.ops.base import OPSET
from graph_passes.region import IR_VERSION, Region, session

_POINTS = np.linspace(-9, 9, 1806, dtype=np.float32)
"""Points at which two activations are told apart; the closest pair, gelu and its tanh form, differ by 4.7e-4."""

_SHAPES = {1: (1806,), 2: (21, 86), 3: (3, 7, 86), 4: (3, 7, 2, 43)}
"""Axes of different extents, so that what sums or turns axes is not taken for an elementwise function."""

_SAME_ACTIVATION = 2e-6
"""Largest difference of two spellings of one activation on the grid: a few float32 roundings of values up to 9."""


def activation_between(model: ir.Model, source: ir.Value, active: ir.Value) -> str:
    """The name in ACTIVATIONS of the elementwise function that leads from `source` to `active`.

    Raises Refusal when it depends on anything else, is not elementwise, or is none that is known.
    """
    if data_leaves(active, [source]) != [source]:
        raise Refusal("the activation depends on more than the gate", active.producer())
    rank = len(source.shape) if source.shape is not None else 2
    grid = _POINTS.reshape(_SHAPES[rank])
    got = Region(model, [source], [active]).run([grid])[0]
    if got.shape != grid.shape:
        raise Refusal("the activation is not elementwise", active.producer())
    gaps = {name: float(np.abs(got.reshape(-1) - _on_the_grid(name)).max()) for name in ACTIVATIONS}
    best = min(gaps, key=lambda name: gaps[name])
    if not gaps[best] <= _SAME_ACTIVATION:
        nearest = f"the nearest, {best}, differs by {gaps[best]:.1e}"
        raise Refusal(f"the activation is none that is known; {nearest}", active.producer())
    return best


@functools.cache
def _on_the_grid(name: str) -> npt.NDArray[np.float32]:
    """The activation of that name at the points, by the ops' own statements."""
    text = (
        f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>\n'
        f"activation (float[I] gate) => (float[I] active) {{ {activation_body(name, 'gate', 'active')} }}"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    return np.asarray(session(model).run(None, {"gate": _POINTS})[0])
