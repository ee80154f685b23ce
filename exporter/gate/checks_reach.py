"""How far a token is seen: receptive field, causality, windows, and what is left after a hundred windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from exporter.borders import last_position
from exporter.gate.feeding import Row, Run
from exporter.gate.plan import LONGEST_PROBE, LONGEST_ROLL
from exporter.validation_report import FULL, Check
from reference.parity import position_errors

WINDOWS = 100
"""Of the largest window, that a row rolls through."""


def _reach(windows: tuple[int | None, ...]) -> int | None:
    """How many tokens back anything is seen: each layer adds W − 1; None where a layer sees everything."""
    found = [window for window in windows if window is not None]
    return sum(window - 1 for window in found) if found and len(found) == len(windows) else None


def receptive_field(run: Run) -> Iterator[Check]:
    """One token is changed: logits beyond its reach keep every bit, and the last ones within it move."""
    session, kv, vocabulary = run.session, run.session.manifest.kv, run.session.manifest.model.vocab_size
    reach, most = _reach(run.windows), LONGEST_PROBE[run.plan.suite]
    length = (reach if reach is not None else len(run.first.tokens)) + kv.chunk + 2
    end = last_position(session)
    if end is not None:
        length = min(length, end)
    if length > most or (run.plan.suite != FULL and length > 2 * len(run.first.tokens)):
        limit = "" if run.plan.suite != FULL else f"; {most:,} are probed at most"
        yield Check("receptive field", None, f"the row would need {length:,} tokens{limit}")
        return
    at = min(kv.chunk // 2, length - 1) if reach is not None else length // 2
    row = run.rng.integers(0, vocabulary, length, dtype=np.int64)
    other = row.copy()
    other[at] = (other[at] + 1) % vocabulary
    moved = _moved(run, row, other)
    past = not moved[:at].any()
    yield Check("causality", past, f"changing token {at} moves {'no bit' if past else 'logits'} before it")
    if reach is None:
        return
    beyond = np.flatnonzero(moved[at + reach + 1 :])
    if at + reach + 1 >= length:
        yield Check("receptive field", None, f"a row ends at {end} tokens, before anything is out of reach")
    elif len(beyond):
        distance = int(beyond[-1]) + reach + 1
        yield Check("receptive field", False, f"a token {distance} away moved a logit; {reach} is as far as one may")
    else:
        yield Check("receptive field", True, f"a token more than L·(W − 1) = {reach} away moves no bit")
    farthest = int(np.flatnonzero(moved)[-1]) - at if moved.any() else 0
    inside = min(window for window in run.windows if window is not None) - 1
    # Within one layer's own window a change cannot fade into rounding.
    seen = bool(moved[at : at + inside + 1].all())
    yield Check(
        "window is used",
        seen,
        f"a token up to {inside} away moves the logits; the farthest that did was {farthest} away"
        if seen
        else f"a token at most {inside} away moved nothing",
    )


def _moved(run: Run, row: Row, other: Row) -> npt.NDArray[np.bool_]:
    """Whether any logit of a token differs between two rows, bool [T]; fed chunk by chunk in both."""
    chunk, found = run.session.manifest.kv.chunk, []
    for tokens in (row, other):
        run.session.reset()
        pieces = [run.session.forward(tokens[at : at + chunk])[0] for at in range(0, len(tokens), chunk)]
        found.append([piece.copy() for piece in pieces])
    return np.concatenate([(a != b).any(axis=-1) for a, b in zip(*found, strict=True)])


def long_roll(run: Run) -> Iterator[Check]:
    """A hundred windows, then the truth of the last tokens, which nothing beyond the receptive field touches."""
    name, session, kv = "long roll", run.session, run.session.manifest.kv
    reach, most = _reach(run.windows), LONGEST_ROLL[run.plan.suite]
    widest = max((window for window in run.windows if window is not None), default=None)
    if reach is None or widest is None:
        yield Check(name, None, "a layer sees the whole context, which the prompts reach the end of")
        return
    length, end = WINDOWS * widest, last_position(session)
    compared = min(kv.chunk, 32)
    tail = reach + compared
    if end is not None and length > end:
        yield Check(name, None, f"a row ends at {end} tokens")
        return
    if length > most or tail > LONGEST_PROBE[FULL]:
        yield Check(name, None, f"{length:,} tokens, of which {tail:,} need the truth, are more than this suite feeds")
        return
    length = max(length, tail)
    row = run.rng.integers(0, session.manifest.model.vocab_size, length, dtype=np.int64)
    session.reset()
    session.forward_last(row[: length - compared])
    got = session.forward(row[length - compared :])[0]
    last = list(range(tail - compared, tail))
    (truth,) = run.oracle.logits(
        [row[length - tail :].tolist()], torch.float64, wanted=[last], first_position=length - tail
    )
    errors = position_errors(truth.numpy(), got)
    allowed = max(row.allowed_R.max() for row in run.truth.rows)
    held = bool((errors <= allowed).all())
    detail = f"the last {compared} of {length:,} tokens, {length // widest} windows on"
    yield Check(name, held, detail, float(errors.max()), budget=float(allowed))
