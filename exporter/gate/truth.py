"""What an engine is held against: the reference's logits in float64, and how far the engine may be from them.

Letters: T tokens of a row, R of them whose logits are compared, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from exporter.gate.routers import RouterLog, RouterSwap, Undecided, undecided
from reference.config import MoEConfig
from reference.oracle import Oracle
from reference.parity import Budget, budget, position_errors
from reference.rounding import Rounding

Progress = Callable[[str, int, int], None]
Row = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating]

FOLLOWING = 8.0
"""Margins of undecided routers, within which a token may take another expert because one before it did."""


@dataclass(frozen=True, slots=True)
class TruthRow:
    """A row of tokens with the truth at some of its positions.

    positions: indices of these tokens, rising, int64 [R]. logits_RV: float64. allowed_R: what each may be off by.
    undecided: from which token on an engine may have taken another expert; the row's length where none may have.
    """

    tokens: Row
    positions: Row
    logits_RV: Logits
    allowed_R: npt.NDArray[np.float64]
    undecided: int


@dataclass(frozen=True, slots=True)
class Truth:
    """All rows, and the budget that holds where no router is undecided."""

    rows: tuple[TruthRow, ...]
    budget: Budget


def make_truth(
    oracle: Oracle,
    rows: Sequence[Row],
    wanted: Sequence[Row],
    *,
    moe: MoEConfig | None,
    arithmetic: str,
    rounding: Rounding,
    dtype: str,
    progress: Progress | None,
    first_position: int = 0,
) -> Truth:
    """Run the reference over `rows` in float64 and as the engine computes.

    wanted: for each row the positions whose logits are compared. arithmetic, rounding, dtype: the engine's; see
    `exporter.quantized_reference.of_engine`. first_position: of every row; see `Oracle.logits`.

    Raises CheckpointError where the truth is not finite, whichever expert an undecided token is sent to.
    """

    def logits(dtype: torch.dtype, rounding: Rounding, on_layer: RouterLog | RouterSwap | None) -> list[Logits]:
        found = oracle.logits(
            [row.tolist() for row in rows],
            dtype,
            progress,
            rounding=rounding,
            wanted=[places.tolist() for places in wanted],
            first_position=first_position,
            on_layer=on_layer,
        )
        return [row.to(torch.float64 if dtype == torch.float64 else torch.float32).numpy() for row in found]

    narrow = moe is not None and dtype != "float32"
    logs = (RouterLog(), RouterLog())
    truth = logits(torch.float64, Rounding(), logs[0] if narrow else None)
    own = logits(getattr(torch, arithmetic), rounding, logs[1] if narrow else None)
    if not narrow or moe is None:
        made = budget(truth, own, dtype)
        allowed = [np.full(len(places), made.allowed) for places in wanted]
        return Truth(_rows(rows, wanted, truth, allowed, [len(row) for row in rows]), made)
    near = undecided(*logs, moe.top_k, [len(row) for row in rows])
    # From its first undecided token on, the reference in the engine's type may have taken another expert as well.
    settled = [places < first for places, first in zip(wanted, near.first, strict=True)]
    own_errors = [position_errors(a, b) for a, b in zip(truth, own, strict=True)]
    if not any(each.any() for each in settled):  # most tokens did not
        usual = float(np.median(np.concatenate(own_errors)))
        settled = [errors <= usual for errors in own_errors]
    made = budget(truth, [np.where(s[:, None], b, a) for a, b, s in zip(truth, own, settled, strict=True)], dtype)
    allowed = [np.full(len(places), made.allowed) for places in wanted]
    if any(near.tokens):
        # Behind a token that went elsewhere, nearly decided ones may follow: they are swapped as well.
        wider = [FOLLOWING * margin for margin in near.margins]
        swapped = logits(torch.float64, Rounding(), RouterSwap(wider, moe.top_k))
        budget(swapped, swapped, dtype)  # refuses what is not finite
        costs = [np.maximum(own, position_errors(a, b)) for own, a, b in zip(own_errors, truth, swapped, strict=True)]
        allowed = _allowed(costs, wanted, near, made)
    return Truth(_rows(rows, wanted, truth, allowed, near.first), made)


def _rows(
    rows: Sequence[Row],
    wanted: Sequence[Row],
    truth: Sequence[Logits],
    allowed: Sequence[npt.NDArray[np.float64]],
    first: Sequence[int],
) -> tuple[TruthRow, ...]:
    return tuple(map(TruthRow, rows, wanted, truth, allowed, first))


def _allowed(
    costs: Sequence[npt.NDArray[np.float64]], wanted: Sequence[Row], near: Undecided, made: Budget
) -> list[npt.NDArray[np.float64]]:
    """Before a row's first undecided token the budget, and from it on what taking other experts costs anywhere: a token
    behind it whose router was decided may be moved far enough to take another one too. costs: of rounding and of that.
    """
    behind = [places >= first for places, first in zip(wanted, near.first, strict=True)]
    most = max(float(cost[marked].max(initial=0.0)) for cost, marked in zip(costs, behind, strict=True))
    return [np.where(marked, max(made.allowed, made.tolerance.multiple * most), made.allowed) for marked in behind]
