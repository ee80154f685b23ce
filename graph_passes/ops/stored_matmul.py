"""StoredMatMul: rows times a weight that is read as it is stored, in float32 or in one of the two-byte types."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes

_MOST_NUMBERS = 1 << 20
"""Weights up to this size are proved at their own size; larger ones with fewer rows and columns."""


def _body(attributes: Attributes) -> str:
    """A runtime may widen and turn the weight when it loads and keep that."""
    return """
    weight = CastLike (weight_NK, x_K)
    weight_KN = Transpose <perm = [1, 0]> (weight)
    y_N = MatMul (x_K, weight_KN)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """One row and three under every axis; weights of the node's own size as far as that is small."""
    *leading, _ = shapes[0]
    N, K = (extent if isinstance(extent, int) else 5 for extent in shapes[1])
    if N * K > _MOST_NUMBERS:
        N, K = min(N, 64), min(K, 64)
    for rows in (1, 3):
        shape = [extent if isinstance(extent, int) else rows for extent in leading]
        x = rng.standard_normal((*shape, K), dtype=np.float32)
        yield x, rng.standard_normal((N, K), dtype=np.float32)


STORED_MATMUL = PluginOp(
    name="StoredMatMul",
    inputs=("x_K", "weight_NK"),
    outputs=("y_N",),
    attributes={},
    body=_body,
    examples=_examples,
    rows=True,
)
"""x float32 [..., K] and weight float32, float16 or bfloat16 [N, K] to x · weightᵀ, float32 [..., N]."""
