"""Where a router is undecided: there an engine may take another expert than the truth, and be no worse for it.

A rounded router logit may fall to the other side of one that is nearly as large. From that token on the two compute
different functions, and nothing can be said by comparing them, not even that the engine is as far off as the reference
in the same type, which may have decided that one as the truth does. So a comparison ends before the first such token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from reference.rounding import Rounding
from reference.watched import WatchedOracle

ERRORS = 4.0
"""A router is undecided where its last chosen logit lies less than so many typical errors above the first one left out.

Typical is the median error of the reference's router logits in the engine's type. Two logits err by twice that between
them; where engines were seen to take another expert, they lay within 0.9 of it.
"""


def decided_lengths(
    oracle: WatchedOracle, rows: Sequence[list[int]], top_k: int, dtype: torch.dtype, rounding: Rounding
) -> list[int]:
    """How many tokens of each row come before the first one of which a router is undecided."""
    return [_decided(oracle, row, top_k, dtype, rounding) for row in rows]


def _decided(oracle: WatchedOracle, row: list[int], top_k: int, dtype: torch.dtype, rounding: Rounding) -> int:
    truth_LTE = _router_logits(oracle, row, torch.float64, Rounding())
    error_LT = np.abs(_router_logits(oracle, row, dtype, rounding) - truth_LTE).max(axis=-1)
    sorted_LTE = -np.sort(-truth_LTE, axis=-1)
    if top_k == sorted_LTE.shape[-1]:
        return len(row)
    gap_LT = sorted_LTE[..., top_k - 1] - sorted_LTE[..., top_k]
    undecided_T = (gap_LT < ERRORS * np.median(error_LT, axis=-1).max()).any(axis=0)
    return int(np.argmax(undecided_T)) if undecided_T.any() else len(row)


def _router_logits(
    oracle: WatchedOracle, row: list[int], dtype: torch.dtype, rounding: Rounding
) -> NDArray[np.float64]:
    """[L, T, E]"""
    stages = oracle.stages(row, dtype, rounding)
    return np.stack(
        [logits.double().numpy() for stage in stages for name, logits in stage.items() if name.endswith(".moe.router")]
    )
