"""Steps in a few widths only. ONNX Runtime keeps the memory of intermediate values, and what a step a little wider than
all before needs, it takes beside that; so texts that grow word by word would take ever more.

Padding on the right changes nothing: tokens from `count` on are seen by nobody.

Letters: T tokens of a step.
"""

from __future__ import annotations

_TILE = 128
"""Rows that a GPU multiplies at once; fewer take hardly less time."""


def padded_width(tokens: int, chunk: int) -> int:
    """The next power of two up to 128 and the next multiple of that beyond, but never more than the chunk that the
    graph was built for: 1 <= tokens <= chunk."""
    wide = 1 << (tokens - 1).bit_length() if tokens < _TILE else -(-tokens // _TILE) * _TILE
    return min(wide, chunk)
