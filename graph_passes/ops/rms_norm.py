"""RMSNorm: each row divided by its root mean square, times a weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes


def _body(attributes: Attributes) -> str:
    """Spelled out and not RMSNormalization of opset 23, which some runtimes still lack in float64."""
    return """
    two_raw = Constant <value_float = 2.0> ()
    two = CastLike (two_raw, x_C)
    epsilon_raw = Constant <value_float: float = @epsilon> ()
    epsilon = CastLike (epsilon_raw, x_C)
    last_axis = Constant <value_ints = [-1]> ()
    square = Pow (x_C, two)
    mean = ReduceMean <keepdims = 1> (square, last_axis)
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    inverse = Reciprocal (root)
    normed = Mul (x_C, inverse)
    y_C = Mul (normed, weight_C)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Rows near one, large ones, such as the epsilon outweighs, and zeros; the weight is far from one."""
    *leading, width = shapes[0]
    C = width if isinstance(width, int) else 6
    for rows in (1, 3):
        shape = [extent if isinstance(extent, int) else rows for extent in leading]
        for size in (1.0, 1e3, 0.1 * float(attributes["epsilon"]) ** 0.5, 0.0):
            x = np.float32(size) * rng.standard_normal((*shape, C), dtype=np.float32)
            yield x, 3 * rng.standard_normal(C, dtype=np.float32)


RMS_NORM = PluginOp(
    name="RMSNorm",
    inputs=("x_C", "weight_C"),
    outputs=("y_C",),
    attributes={"epsilon": "float"},
    body=_body,
    examples=_examples,
    rows=True,
)
"""x [..., C] and weight [C] to y [..., C]: y = x / sqrt(mean(x²) + epsilon) · weight, the mean over C."""
