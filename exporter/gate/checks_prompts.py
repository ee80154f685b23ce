"""The same tokens in all the ways in which they may reach an engine, each held against the truth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from exporter.gate.feeding import Logits, Run, compare, everywhere, logits_at
from exporter.gate.plan import SINGLES, SPLITS
from exporter.validation_report import QUICK, Check


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
    """The row cut at random places around the chunk's length, in several ways."""
    row, chunk = run.first, run.session.manifest.kv.chunk
    for number in range(SPLITS[run.plan.suite]):
        run.session.reset()
        pieces, left = [], len(row.tokens)
        while left:
            most = min(chunk, max(1, len(row.tokens) // 3))  # a row shorter than a chunk is cut as well
            sizes = [1, 2, max(1, most - 1), most, most + 1, int(run.rng.integers(1, 2 * most + 2))]
            pieces.append(min(left, int(run.rng.choice(sizes))))
            left -= pieces[-1]
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
    session, tokens = run.session, run.first.tokens
    most = session.most_top
    if most:
        session.reset()
        logits_V = session.forward_last(tokens)[0].copy()
        session.reset()
        (found,) = session.forward_candidates(tokens, most, lambda _: True)
        due = np.sort(np.argsort(-logits_V, kind="stable")[:most])
        assert found is not None
        assert found.ids_N is not None
        same = bool(np.array_equal(found.ids_N, due) and np.array_equal(found.logits_N, logits_V[due]))
        detail = f"the {most} that the engine gives {'are' if same else 'are not'} the highest of all"
        yield Check("highest logits", same, detail)


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


def ragged_batch(run: Run) -> Iterator[Check]:
    """Three rows of different lengths side by side, in two feeds, of which the second begins elsewhere in each."""
    name, rows = "ragged batch", run.truth.rows
    session, kv = run.session, run.session.manifest.kv
    if kv.max_batch < len(rows):
        yield Check(name, None, f"the bundle was exported for {kv.max_batch} rows")
        return
    session.reset()
    cuts = [max(1, len(row.tokens) // 3) for row in rows]
    if run.plan.suite == QUICK:
        cuts[0] = len(rows[0].tokens) // 2 + 1
    feeds = [[row.tokens[:cut].tolist() for row, cut in zip(rows, cuts, strict=True)]]
    feeds.append([row.tokens[cut:].tolist() for row, cut in zip(rows, cuts, strict=True)])
    found: list[list[Logits]] = [[] for _ in rows]
    for begin, feed in zip((None, cuts), feeds, strict=True):
        if not any(feed):
            continue
        logits_BTV = session.forward(feed)
        for number, (row, tokens) in enumerate(zip(rows, feed, strict=True)):
            offset = 0 if begin is None else begin[number]
            inside = row.positions[(row.positions >= offset) & (row.positions < offset + len(tokens))] - offset
            found[number].append(logits_BTV[number, inside].copy())
    for number, (row, pieces) in enumerate(zip(rows, found, strict=True)):
        detail = f"{len(row.tokens)} tokens beside rows of other lengths"
        yield compare(f"{name}, row {number}", row, everywhere(row), np.concatenate(pieces), detail)
    yield from _end_of_context(run)
    session.reset()
    session.forward_last(rows[0].tokens[:1])  # back to one row


def _end_of_context(run: Run) -> Iterator[Check]:
    """A row takes its very last token while another takes a whole chunk: its padding has no place in its buffers."""
    session, kv = run.session, run.session.manifest.kv
    row, other = run.truth.rows[:2]
    end, tokens = kv.context, len(row.tokens)
    if end is None or tokens != end or end < 2:
        return
    size = min(kv.chunk, len(other.tokens) - 1)
    before = other.tokens[: len(other.tokens) - size]
    session.reset()
    session.forward_last([row.tokens[:-1].tolist(), before.tolist()])
    logits_BTV = session.forward([row.tokens[-1:].tolist(), other.tokens[len(before) :].tolist()])
    which = row.positions == end - 1
    detail = f"token {end - 1}, the last that there is room for, beside {size} tokens of another row"
    yield compare("ragged batch, end of the context", row, which, logits_BTV[0, : int(which.sum())].copy(), detail)
