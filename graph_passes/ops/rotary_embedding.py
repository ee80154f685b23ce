"""RotaryEmbedding: turns the two halves of each head against each other (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes, static


def _body(attributes: Attributes) -> str:
    return "rotated_BHTD = RotaryEmbedding <interleaved: int = @interleaved> (x_BHTD, cos_BTd, sin_BTd)"


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Cosine and sine are not on the unit circle, nor alike for two positions: nothing may cancel or be swapped."""
    H, D = static(shapes[0], 1, 3), static(shapes[0], 3, 8)
    for rows, tokens in ((1, 1), (2, 5)):
        B, T = static(shapes[0], 0, rows), static(shapes[0], 2, tokens)
        x = rng.standard_normal((B, H, T, D), dtype=np.float32)
        cos, sin = rng.standard_normal((2, B, T, D // 2), dtype=np.float32)
        yield x, cos, sin


ROTARY_EMBEDDING = PluginOp(
    name="RotaryEmbedding",
    inputs=("x_BHTD", "cos_BTd", "sin_BTd"),
    outputs=("rotated_BHTD",),
    attributes={"interleaved": "int"},
    body=_body,
    examples=_examples,
)
"""x [B, H, T, D], cos and sin [B, T, D/2] to [B, H, T, D].

interleaved 0: element i turns against i + D/2 (Hugging Face); 1: element 2i against 2i + 1 (Mistral's own files).
"""
