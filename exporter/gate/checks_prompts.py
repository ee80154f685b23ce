"""The same tokens in all the ways in which they may reach an engine, each held against the truth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from exporter.gate.feeding import Logits, Run, compare, everywhere, logits_at
from exporter.gate.plan import MOST_SPLIT_TOKENS, SINGLES, SPLITS
from exporter.validation_report import Check
from runtime.sampling import Candidates


def whole_prompts(run: Run) -> Iterator[Check]:
    """A prompt of each border's length."""
    row, session = run.first, run.session
    for length in run.plan.lengths:
        session.reset()
        begun = time.perf_counter()
        got = logits_at(session, row.tokens[:length], row.positions[row.positions < length])
        run.timings.setdefault("prefill", []).append((length, time.perf_counter() - begun))
        yield compare(f"prompt of {length}", row, row.positions < length, got, "whole prompt, all positions")
    if run.plan.left_out:
        lengths = ", ".join(f"{length:,}" for length in run.plan.left_out)
        yield Check("longer prompts", None, f"prompts of {lengths} tokens are for the suite full")


def uneven_pieces(run: Run) -> Iterator[Check]:
    """The row cut at random places, in several ways that deal out all widths that a step may have."""
    row, fed = run.first, 0
    fewest, most = SPLITS[run.plan.suite]
    length, chunk = len(row.tokens), run.session.manifest.kv.chunk
    widest = min(chunk, max(1, length // 3 if most == 1 else length))  # a row shorter than a chunk is cut as well
    deck = np.array([*range(1, widest + 2), 2 * widest + 1])
    left_over: list[int] = []
    for number in range(most):
        if number >= fewest and (not left_over or fed > MOST_SPLIT_TOKENS):
            break
        run.session.reset()
        pieces: list[int] = []
        while sum(pieces) < length:
            if not left_over:
                left_over = run.rng.permutation(deck).tolist()
            room = length - sum(pieces)
            fitting = [size for size in left_over if size <= room]
            size = fitting[0] if fitting else left_over[0]
            left_over.remove(size)
            pieces.append(min(size, room))
        fed += length
        got = logits_at(run.session, row.tokens, row.positions, pieces)
        name = "uneven pieces" if number == 0 else f"uneven pieces, split {number + 1}"
        yield compare(name, row, everywhere(row), got, f"{len(pieces)} feeds of random sizes up to {max(pieces)}")


def last_tokens(run: Run) -> Iterator[Check]:
    """The row cut at every border; the head sees the last token of each piece, and in most steps none."""
    row, session = run.first, run.session
    session.reset()
    ends = [length for length in run.plan.lengths if length - 1 in row.positions]
    cuts = [0, *ends]
    got = [session.forward_last(row.tokens[first:end]).copy() for first, end in pairwise(cuts)]
    which = np.isin(row.positions, np.array(ends) - 1)
    detail = f"the last token's logits of {len(ends)} feeds that end at the borders"
    yield compare("last tokens", row, which, np.concatenate(got), detail)


def highest(run: Run) -> Iterator[Check]:
    """Engines that choose among logits themselves: what they give out, against all logits of the same engine."""
    session, rows = run.session, run.truth.rows
    most, kv = session.most_top, session.manifest.kv
    if not most:
        return
    for name, fed in (("highest logits", rows[:1]), ("highest logits, batch", rows[: kv.max_batch][::-1])):
        if name != "highest logits" and len(fed) == 1:
            continue
        tokens = [row.tokens.tolist() for row in fed]
        session.reset()
        logits_BV = session.forward_last(tokens).copy()
        session.reset()
        tops = session.forward_candidates(tokens, most, lambda _: True)
        session.reset()
        full = session.forward_candidates(tokens, most, lambda _: False)
        same = all(map(_are_the_highest, tops, full, logits_BV))
        detail = f"the {most} that the engine gives {'are' if same else 'are not'} the highest of all"
        yield Check(name, same, detail)


def _are_the_highest(top: Candidates | None, everything: Candidates | None, logits_V: Logits) -> bool:
    """top: given where the highest suffice; everything: given where they do not."""
    if top is None or top.ids_N is None or everything is None:
        return False
    due = np.sort(np.argsort(-logits_V, kind="stable")[: len(top.ids_N)])
    given = np.array_equal(top.ids_N, due) and np.array_equal(top.logits_N, logits_V[due])
    return bool(given and np.array_equal(everything.logits_N, logits_V))


def one_at_a_time(run: Run) -> Iterator[Check]:
    """The end of the row, where every ring has wrapped, token by token."""
    row, session = run.first, run.session
    first = max(0, len(row.tokens) - SINGLES[run.plan.suite])
    which = row.positions >= first
    session.reset()
    if first:
        session.forward_last(row.tokens[:first])
    found: list[Logits] = []
    for at in range(first, len(row.tokens)):
        begun = time.perf_counter()
        logits_TV = session.forward(row.tokens[at : at + 1])[0]
        run.timings.setdefault("decode", []).append((1, time.perf_counter() - begun))
        if at in row.positions:
            found.append(logits_TV.copy())
    detail = f"the last {len(row.tokens) - first} tokens singly"
    yield compare("one at a time", row, which, np.concatenate(found), detail)
