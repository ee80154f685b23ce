"""What RollingAttention may differ by where its attribute `rounds` lets it multiply in bfloat16.

Queries (scaled, with the logarithm's factor, for scores to base 2), keys and values are rounded to bfloat16. These
roundings are done here too, so that truth is of the rounded numbers and only two things are left:

  The weights are rounded, each by a factor of 1 ± u with u = 2^-8, after a power of 2 that is right to 2^-18.
  The query comes from a rotation in float32, and where that ends beside the middle between two bfloat16 it may go to
  either. With a_d the distance of those two (0 nearly everywhere), its scores change by at most s = Σ a_d |key_d|, and
  its weights by a factor between 2^-s and 2^s, the greatest s of the keys that it sees.

So a weight p becomes p·w with w between m = (1 - u)(1 - 2^-18) 2^-s and M = (1 + u)(1 + 2^-18) 2^s. As the total is
that of the weights p·w, and Σ p (v - o) = 0 for the mean o = Σ p v of the values,

  |Σ p w v / Σ p w - o| = |Σ p (w - (M + m)/2) (v - o)| / Σ p w <= (M - m) / 2m · Σ p |v - o|

for each number of the vector, besides the sums in float32, which have the budget that they have everywhere.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNIT, POWER = 2.0**-8, 2.0**-18
TO_BASE_2 = float(np.float32(1.44269504))
TOKENS = 16
"""Rows with fewer tokens in a step are never rounded."""


def to_bfloat16(x: Array) -> Array:
    """Float32 numbers rounded to the nearest bfloat16, as float64."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def rounded_query(query: Array, largest: Array) -> tuple[Array, Array]:
    """The rounded query, and how far either neighbour may be from it where float32 does not say which it is.

    query: rotated, times scale and TO_BASE_2, float64. largest: of the products that make a number of it.
    """
    doubt = 4 * np.finfo(np.float32).eps * largest
    middle = to_bfloat16(query)
    return middle, np.maximum(np.abs(to_bfloat16(query + doubt) - middle), np.abs(to_bfloat16(query - doubt) - middle))


def allowed_for_weights(query_HD: Array, doubt_HD: Array, key_HSD: Array, value_HSD: Array) -> Array:
    """The bound above for one token's heads and the slots that it sees, all rounded; [H, D]."""
    score = np.einsum("hd,hsd->hs", query_HD, key_HSD)
    weight = np.exp2(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    mean = np.einsum("hs,hsd->hd", weight, value_HSD)
    spread = np.einsum("hs,hsd->hd", weight, np.abs(value_HSD - mean[:, None]))
    s = np.einsum("hd,hsd->hs", doubt_HD, np.abs(key_HSD)).max(-1)
    least, most = (1 - UNIT) * (1 - POWER) * np.exp2(-s), (1 + UNIT) * (1 + POWER) * np.exp2(s)
    bound: Array = ((most - least) / (2 * least))[:, None] * spread
    return bound
