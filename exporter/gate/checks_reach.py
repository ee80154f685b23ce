"""How far a token is seen: receptive field, causality, windows, and what is left after a hundred windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from exporter.borders import last_position
from exporter.gate.feeding import Logits, Row, Run, compare, everywhere
from exporter.gate.plan import LONGEST_PROBE, LONGEST_ROLL
from exporter.validation_report import FULL, Check

WINDOWS = 100
"""Of the largest window, that a row rolls through."""

CANDIDATES = 32
"""Tokens that are tried before a model is taken to tell none from another."""


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
    found = _another(run, int(row[at]))
    if found is None:
        yield Check("receptive field", None, "no other token was found that the model tells from the first one")
        return
    other[at] = found
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


def _another(run: Run, token: int) -> int | None:
    """A token that gives other logits; vocabularies have rows that nobody trained, which are all alike."""
    vocabulary = run.session.manifest.model.vocab_size

    def logits_after(candidate: int) -> Logits:
        run.session.reset()
        return run.session.forward_last([candidate])

    due = logits_after(token)
    steps = range(1, min(vocabulary, CANDIDATES))
    candidates = ((token + step * step) % vocabulary for step in steps)
    return next((each for each in candidates if (logits_after(each) != due).any()), None)


def _moved(run: Run, row: Row, other: Row) -> npt.NDArray[np.bool_]:
    """Whether any logit of a token differs between two rows, bool [T]; fed chunk by chunk in both.

    Token by token where there are experts: an expert works on all tokens of a step that chose it at once, and adds in
    an order that may depend on how many these are. So a token may move the last bits of one that does not see it.
    """
    chunk, found = 1 if run.mixture else run.session.manifest.kv.chunk, []
    for tokens in (row, other):
        run.session.reset()
        pieces = (run.session.forward(tokens[at : at + chunk])[0] for at in range(0, len(tokens), chunk))
        # Logits of thousands of tokens are gigabytes, their digests are not.
        found.append([hashlib.sha256(logits_V.tobytes()).digest() for piece in pieces for logits_V in piece])
    return np.array([a != b for a, b in zip(*found, strict=True)])


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
    truth = run.truth_of([row[length - tail :]], [np.arange(tail - compared, tail)], first_position=length - tail)
    allowed_R = np.maximum(truth.rows[0].allowed_R, run.truth.budget.allowed)
    detail = f"the last {compared} of {length:,} tokens, {length // widest} windows on"
    yield compare(name, replace(truth.rows[0], allowed_R=allowed_R), everywhere(truth.rows[0]), got, detail)


def undecided_routers(run: Run) -> Iterator[Check]:
    """Says how much of the rows is held less tightly, where some is."""
    budget, rows = run.truth.budget.allowed, run.truth.rows
    allowed = np.concatenate([row.allowed_R for row in rows])
    wider = allowed > budget
    if wider.any():
        detail = (
            f"{int(wider.sum())} of {len(allowed)} tokens lie at or behind one that a router is undecided about: "
            f"taking another expert is no fault, so they may be off by up to {allowed.max():.1e}"
        )
        yield Check("undecided routers", None, detail)
