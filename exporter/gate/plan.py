"""What a suite feeds: how long the rows are, which positions are compared, and what is too long for it.

The reference costs two operations for each parameter and token, once in float64 and once in the engine's type, and
an engine about as much again. `quick` is to end within a minute on a model of a billion parameters and two cores, so it
bounds the tokens by the size of the model; `full` takes every border there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporter.borders import boundary_lengths, last_position
from exporter.validation_report import QUICK
from runtime.session import Session

Row = npt.NDArray[np.int64]

QUICK_WORK = 8e10
"""Parameters times tokens of the longest row in the suite `quick`: 80 tokens of a model of a billion."""

QUICK_TOKENS = (24, 640)
"""Fewest and most tokens of that row."""

MOST_TRUTH_BYTES = 1 << 29
"""The truth's logits of all rows in float64; of longer rows some positions are compared, borders among them."""

LONGEST_PROBE = {"quick": 640, "full": 8192}
"""A receptive field beyond this many tokens is not probed: the row would have to be longer still."""

LONGEST_ROLL = {"quick": 0, "full": 1 << 16}
"""A hundred windows are rolled through where that is not more tokens than this."""

SINGLES = {"quick": 16, "full": 96}
"""Tokens that are fed one at a time at most, at the end of the row, where every ring has wrapped."""

SPLITS = {"quick": (1, 1), "full": (4, 32)}
"""Fewest and most ways in which the row is cut into uneven pieces: more until each width of a step was dealt once."""

MOST_SPLIT_TOKENS = 4096
"""Where the fewest ways are fewer tokens than this, the row is cut in more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """lengths: prompts that are fed whole, rising; the longest is the first row's. left_out: borders beyond it.

    rows: tokens of the first row and of two shorter ones, which make a ragged batch. wanted: positions of each that are
    compared.
    """

    suite: str
    lengths: tuple[int, ...]
    left_out: tuple[int, ...]
    rows: tuple[Row, ...]
    wanted: tuple[Row, ...]


def make_plan(
    session: Session, windows: tuple[int | None, ...], parameters: int, suite: str, rng: np.random.Generator
) -> Plan:
    """The plan of a suite for this model. windows: the checkpoint's, by layer: the bundle may be wrong."""
    vocabulary = session.manifest.model.vocab_size
    lengths = boundary_lengths(session, windows)
    left_out: list[int] = []
    if suite == QUICK:
        least, most = QUICK_TOKENS
        longest = max(least, min(most, int(QUICK_WORK / max(1, parameters))))
        left_out = [length for length in lengths if length > longest]
        end = last_position(session)
        here = longest if end is None else min(longest, end)
        kept = [length for length in lengths if length <= longest]
        lengths = sorted({*kept, here}) if left_out else kept
    longest = lengths[-1]
    sizes = (longest, max(1, min(longest, longest // 2 + 1)), max(1, longest // 5))
    rows = tuple(random_tokens(rng, vocabulary, size) for size in sizes)
    return Plan(suite, tuple(lengths), tuple(left_out), rows, _wanted(rows, lengths, vocabulary))


def random_tokens(rng: np.random.Generator, vocabulary: int, count: int) -> Row:
    """Random ids, int64 [count], spread evenly over the vocabulary: its first id and its last are among them.

    Rows of an embedding that are wrong in one stretch, as from some id on, are then among what is fed.
    """
    edges = np.linspace(0, vocabulary, count + 1)
    low = edges[:-1].astype(np.int64)
    ids = rng.integers(low, np.maximum(low + 1, edges[1:].astype(np.int64)))
    ids[0], ids[-1] = 0, vocabulary - 1
    rng.shuffle(ids)
    return ids


def _wanted(rows: Sequence[Row], lengths: Sequence[int], vocabulary: int) -> tuple[Row, ...]:
    most = max(1, MOST_TRUTH_BYTES // (8 * vocabulary))
    if sum(len(row) for row in rows) <= most:
        return tuple(np.arange(len(row)) for row in rows)
    borders = {at for length in lengths for at in (length - 2, length - 1, length)}
    found = []
    for row in rows:
        spread = np.linspace(0, len(row) - 1, max(2, most // 2 * len(row) // sum(len(r) for r in rows)))
        some = {int(at) for at in spread} | {at for at in borders if 0 <= at < len(row)}
        some |= set(range(max(0, len(row) - SINGLES["full"]), len(row)))
        found.append(np.array(sorted(some), np.int64))
    return tuple(found)
