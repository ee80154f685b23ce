"""Feeding an engine and keeping the logits of some positions only, and comparing them with the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from exporter.gate.plan import Plan
from exporter.gate.truth import Truth, TruthRow
from exporter.validation_report import Check
from reference.parity import position_errors
from runtime.session import Session

Row = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating]


MOST_LOGITS = 1 << 26
"""Logits that an engine is asked for at once, 256 MB of them."""


@dataclass(frozen=True, slots=True)
class Run:
    """What all checks of one validation share. windows: the checkpoint's, by layer: the bundle may be wrong.

    mixture: whether layers have experts. truth_of: makes the truth of further rows, see `exporter.gate.truth`.
    timings: (tokens, seconds) of steps by kind, for the report's speeds.
    """

    session: Session
    plan: Plan
    truth: Truth
    windows: tuple[int | None, ...]
    mixture: bool
    truth_of: Callable[..., Truth]
    rng: np.random.Generator
    timings: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def first(self) -> TruthRow:
        """The longest row."""
        return self.truth.rows[0]


def logits_at(session: Session, row: Row, wanted: Row, pieces: Sequence[int] | None = None) -> Logits:
    """Logits [R, V] of the tokens `wanted` of a row that is fed in pieces of these sizes, by default of as many
    whole chunks as may give out MOST_LOGITS at once.

    The session goes on from where it is; `wanted` counts from the row's beginning.
    """
    if pieces is None:
        width = max(1, MOST_LOGITS // session.manifest.model.vocab_size // session.manifest.kv.chunk)
        size = width * session.manifest.kv.chunk
        pieces = [min(size, len(row) - at) for at in range(0, len(row), size)]
    found, at = [], 0
    for size in pieces:
        inside = wanted[(wanted >= at) & (wanted < at + size)] - at
        logits_TV = session.forward(row[at : at + size])[0]
        found.append(logits_TV[inside].copy())  # what is given out is a buffer that the next step overwrites
        at += size
    return np.concatenate(found)


def compare(name: str, row: TruthRow, which: npt.NDArray[np.bool_], got_RV: Logits, detail: str) -> Check:
    """Hold the logits of those of the row's compared positions that `which` marks against the truth."""
    errors, allowed = position_errors(row.logits_RV[which], got_RV), row.allowed_R[which]
    worst = int(np.argmax(errors / allowed))
    over = errors > allowed
    if over.any():
        detail += f"; over budget first at position {int(row.positions[which][int(np.argmax(over))])}"
    return Check(name, not over.any(), detail, float(errors[worst]), budget=float(allowed[worst]))


def everywhere(row: TruthRow) -> npt.NDArray[np.bool_]:
    """All of the row's compared positions."""
    return np.ones(len(row.positions), bool)
