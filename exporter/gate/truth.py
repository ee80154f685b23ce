"""What an engine is held against: the reference's logits in float64, and how far the engine may be from them.

Letters: T tokens of a row, R of them whose logits are compared, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from exporter.gate.routers import RouterLog, RouterSwap, undecided
from reference.config import MoEConfig
from reference.oracle import Oracle
from reference.parity import Budget, budget, position_errors
from reference.rounding import Rounding

Progress = Callable[[str, int, int], None]
Row = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating]


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
) -> Truth:
    """Run the reference over `rows` in float64 and as the engine computes.

    wanted: for each row the positions whose logits are compared. arithmetic, rounding, dtype: the engine's; see
    `exporter.quantized_reference.of_engine`. Raises CheckpointError where the truth itself is not finite.
    """
    tokens, some = [row.tolist() for row in rows], [row.tolist() for row in wanted]
    narrow = moe is not None and dtype != "float32"
    logs = (RouterLog(), RouterLog())
    truth = _run(oracle, tokens, some, torch.float64, Rounding(), logs[0] if narrow else None, progress)
    own = _run(oracle, tokens, some, getattr(torch, arithmetic), rounding, logs[1] if narrow else None, progress)
    made = budget(truth, own, dtype)
    first = [len(row) for row in rows]
    beyond = [made.allowed] * len(rows)
    if narrow and moe is not None:
        near = undecided(*logs, moe.top_k, first)
        if near.first != tuple(first):
            swap = RouterSwap(near.margins, moe.top_k)
            swapped = _run(oracle, tokens, some, torch.float64, Rounding(), swap, progress)
            first = list(near.first)
            beyond = [
                max(made.allowed, made.tolerance.multiple * float(position_errors(a, b).max()))
                for a, b in zip(truth, swapped, strict=True)
            ]
    return Truth(
        tuple(
            TruthRow(row, places, logits, np.where(places < decided, made.allowed, room), decided)
            for row, places, logits, decided, room in zip(rows, wanted, truth, first, beyond, strict=True)
        ),
        made,
    )


def _run(
    oracle: Oracle,
    tokens: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    dtype: torch.dtype,
    rounding: Rounding,
    on_layer: RouterLog | RouterSwap | None,
    progress: Progress | None,
) -> list[Logits]:
    logits = oracle.logits(tokens, dtype, progress, rounding=rounding, wanted=wanted, on_layer=on_layer)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [row.to(wide).numpy() for row in logits]
