"""Rows side by side: of different lengths, in feeds that begin elsewhere in each, up to as many as the bundle takes.

Letters: B rows, R of a row's tokens whose logits are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from exporter.gate.feeding import MOST_LOGITS, Logits, Run, compare, everywhere
from exporter.gate.truth import TruthRow
from exporter.validation_report import QUICK, Check
from runtime.session import Session

MOST_BATCH_BYTES = 1 << 30
"""Of the KV buffers of all rows that a bundle takes; where it would be more, fewer rows are enough."""


def ragged_batch(run: Run) -> Iterator[Check]:
    """Up to three rows side by side, in two feeds, of which the second begins elsewhere in each."""
    name, session = "ragged batch", run.session
    rows = run.truth.rows[: session.manifest.kv.max_batch]
    if len(rows) < 2:
        yield Check(name, None, "the bundle was exported for 1 row")
        return
    cuts = [max(1, len(row.tokens) // 3) for row in rows]
    if run.plan.suite == QUICK:
        cuts[0] = len(rows[0].tokens) // 2 + 1
    session.reset()
    for number, (row, got) in enumerate(zip(rows, _fed(session, rows, cuts), strict=True)):
        detail = f"{len(row.tokens)} tokens beside rows of other lengths"
        yield compare(f"{name}, row {number}", row, everywhere(row), got, detail)
    yield from _last_tokens(run, rows, cuts)
    yield from _end_of_context(run, rows)
    yield from _all_rows(run)
    session.reset()
    session.forward_last(rows[0].tokens[:1])  # back to one row


def _fed(session: Session, rows: Sequence[TruthRow], cuts: Sequence[int]) -> list[Logits]:
    """The logits [R, V] of each row's compared tokens, fed in two parts that are cut there.

    A part is fed in pieces of whole chunks, so that its logits need not be held all at once.
    """
    kv, model = session.manifest.kv, session.manifest.model
    width = kv.chunk * max(1, MOST_LOGITS // (model.vocab_size * kv.chunk * len(rows)))
    found: list[list[Logits]] = [[np.empty((0, model.vocab_size), np.float32)] for _ in rows]
    lengths = [len(row.tokens) for row in rows]
    for begins, ends in (([0] * len(rows), cuts), (cuts, lengths)):
        for piece in range(0, max(end - begin for begin, end in zip(begins, ends, strict=True)), width):
            spans = [
                (min(begin + piece, end), min(begin + piece + width, end))
                for begin, end in zip(begins, ends, strict=True)
            ]
            logits_BTV = session.forward(
                [row.tokens[first:end].tolist() for row, (first, end) in zip(rows, spans, strict=True)]
            )
            for number, (row, (first, end)) in enumerate(zip(rows, spans, strict=True)):
                inside = row.positions[(row.positions >= first) & (row.positions < end)] - first
                found[number].append(logits_BTV[number, inside].copy())
    return [np.concatenate(pieces) for pieces in found]


def _last_tokens(run: Run, rows: Sequence[TruthRow], cuts: Sequence[int]) -> Iterator[Check]:
    """The head sees one token of each row, another in each."""
    session = run.session
    session.reset()
    halves = [(row.tokens[:cut].tolist(), row.tokens[cut:].tolist()) for row, cut in zip(rows, cuts, strict=True)]
    feeds = [session.forward_last(list(half)) for half in zip(*halves, strict=True) if any(half)]
    checks = []
    for number, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        ends = [cut - 1, len(row.tokens) - 1][: 1 + (len(row.tokens) > cut)]
        got = np.stack([feed[number] for feed, end in zip(feeds, ends, strict=False) if end in row.positions])
        checks.append(compare("", row, np.isin(row.positions, ends), got, ""))
    yield _worst("ragged batch, last tokens", checks, f"the last token's logits of {len(feeds)} feeds of all rows")


def _end_of_context(run: Run, rows: Sequence[TruthRow]) -> Iterator[Check]:
    """A row takes its very last token while another takes a whole chunk: its padding has no place in its buffers."""
    session, kv = run.session, run.session.manifest.kv
    row, other = rows[:2]
    end, tokens = kv.context, len(row.tokens)
    if end is None or tokens != end or end < 2 or len(other.tokens) < 2:
        return
    size = min(kv.chunk, len(other.tokens) - 1)
    before = other.tokens[: len(other.tokens) - size]
    session.reset()
    session.forward_last([row.tokens[:-1].tolist(), before.tolist()])
    logits_BTV = session.forward([row.tokens[-1:].tolist(), other.tokens[len(before) :].tolist()])
    which = row.positions == end - 1
    detail = f"token {end - 1}, the last that there is room for, beside {size} tokens of another row"
    yield compare("ragged batch, end of the context", row, which, logits_BTV[0, : int(which.sum())].copy(), detail)


def _all_rows(run: Run) -> Iterator[Check]:
    """As many rows as the bundle takes: the beginnings of the rows that there is a truth of, again and again."""
    name, session, kv = "all rows", run.session, run.session.manifest.kv
    if kv.max_batch <= len(run.truth.rows):
        return
    held = session.kv_bytes // session.batch * kv.max_batch
    if held > MOST_BATCH_BYTES:
        yield Check(name, None, f"the KV buffers of {kv.max_batch} rows would take {held / 1e9:.1f} GB")
        return
    most = 3 if run.plan.suite == QUICK else kv.chunk + 2
    rows = []
    for number in range(kv.max_batch):
        row = run.truth.rows[number % len(run.truth.rows)]
        length = max(1, min(len(row.tokens), most - number % 2))
        which = row.positions < length
        rows.append(
            TruthRow(row.tokens[:length], row.positions[which], row.logits_RV[which], row.allowed_R[which], length)
        )
    session.reset()
    got = _fed(session, rows, [max(1, len(row.tokens) - 1) for row in rows])
    checks = [compare("", row, everywhere(row), each, "") for row, each in zip(rows, got, strict=True)]
    longest = max(len(row.tokens) for row in rows)
    yield _worst(name, checks, f"the first {longest} tokens or fewer in each of {kv.max_batch} rows")


def _worst(name: str, checks: Sequence[Check], detail: str) -> Check:
    """One check of all rows: the error that is nearest to its budget, or farthest beyond."""
    worst = max(checks, key=lambda check: (check.error or 0.0) / (check.budget or 1.0))
    wrong = [str(number) for number, check in enumerate(checks) if not check.passed]
    detail += f"; over budget in row {', '.join(wrong)}" if wrong else ""
    return Check(name, not wrong, detail, worst.error, budget=worst.budget)
