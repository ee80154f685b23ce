"""Chunks in a few widths only: each shape that a plan has not seen costs kernels that are compiled for it.

Padding on the right changes nothing: tokens from `count` on are written nowhere and attended by nobody.

Letters: B batch rows, T tokens of a step, R of them whose logits are asked for.
"""

from __future__ import annotations

import numpy as np

from runtime.chunking import Int64Array


def padded_width(tokens: int, chunk: int) -> int:
    """The next power of two, but never more than the chunk that the plan was built for: 1 <= tokens <= chunk."""
    return min(1 << (tokens - 1).bit_length(), chunk)


def padded(array_BT: Int64Array, width: int) -> Int64Array:
    """int64 [B, width], filled up with zeros on the right."""
    if array_BT.shape[1] == width:
        return array_BT
    wide = np.zeros((array_BT.shape[0], width), np.int64)
    wide[:, : array_BT.shape[1]] = array_BT
    return wide
