"""What a session remembers, and what it must not: reset, reuse, the same bits twice, threads, seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from exporter.borders import last_position
from exporter.gate.feeding import Run, compare, everywhere, logits_at
from exporter.validation_report import Check
from runtime import load
from runtime.backends import chooses_threads
from runtime.backends.cores import physical_cores
from runtime.errors import SessionError

NEW_TOKENS = 12
"""That are drawn with a seed."""


def reset(run: Run) -> Iterator[Check]:
    """The same tokens twice, and once more after other rows and another batch have been through."""
    session, row = run.session, run.first
    tokens = row.tokens
    session.reset()
    before = logits_at(session, tokens, row.positions)
    session.reset()
    same = bool(np.array_equal(before, logits_at(session, tokens, row.positions)))
    yield Check("reset", same, f"the same tokens after a reset give {'the same' if same else 'other'} bits")
    session.reset()
    rows = min(2, session.manifest.kv.max_batch)
    session.forward_last([other.tokens.tolist() for other in run.truth.rows[1 : 1 + rows]])
    session.reset()
    again = logits_at(session, tokens, row.positions)
    same = bool(np.array_equal(before, again))
    detail = f"after other rows, {rows} at once, the row gives {'the same' if same else 'other'} bits"
    against = compare("reuse", row, everywhere(row), again, detail)  # same bits after a batch may be wrong bits
    yield replace(against, passed=bool(same and against.passed))


def threads(run: Run, *, backend: str | None, weights_folder: Path | None) -> Iterator[Check]:
    """Another number of threads adds in another order: other bits perhaps, and the same budget."""
    session, row = run.session, run.first
    if not chooses_threads(backend):
        yield Check("one thread", None, "this backend has no threads to choose")
        return
    count = 1 if physical_cores() > 1 else 2
    other = load(session.bundle.path, backend=backend, threads=count, weights_folder=weights_folder)
    got = logits_at(other, row.tokens, row.positions)
    name = "one thread" if count == 1 else "two threads"
    yield compare(name, row, everywhere(row), got, f"the whole row on {name}")


def sampling(run: Run) -> Iterator[Check]:
    """A seed draws the same tokens twice, and greedy tokens are the best by the engine's own logits."""
    session, tokens = run.session, run.first.tokens
    end = last_position(session)
    prompt = tokens[: max(1, min(len(tokens) // 2, 64))].tolist()
    if end is not None and len(prompt) + NEW_TOKENS > end:
        prompt = prompt[: max(1, end - NEW_TOKENS)]
    room = NEW_TOKENS if end is None else min(NEW_TOKENS, end - len(prompt))
    if room < 1:
        yield Check("seeded sampling", None, f"a row of {end} tokens leaves no room for new ones")
        return
    try:
        drawn = []
        for _ in range(2):
            session.reset()
            options = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "stop_ids": (), "max_new_tokens": room}
            drawn.append(list(session.generate(prompt, **options)))
        session.reset()
        greedy = list(session.generate(prompt, temperature=0.0, stop_ids=(), max_new_tokens=room))
    except SessionError as error:  # logits that are no numbers, from which nothing can be drawn
        yield Check("seeded sampling", False, f"no tokens can be drawn: {error}")
        return
    same = drawn[0] == drawn[1]
    yield Check("seeded sampling", same, f"{room} tokens drawn twice with one seed are {'the same' if same else 'not'}")
    session.reset()
    logits_TV = session.forward([*prompt, *greedy[:-1]])[0][len(prompt) - 1 :]
    short = logits_TV.max(axis=-1) - logits_TV[np.arange(len(greedy)), greedy]
    allowed = max(float(row.allowed_R.max()) for row in run.truth.rows)  # wherever a router may be undecided
    held = bool((short <= 2 * allowed).all())
    detail = f"{len(greedy)} greedy tokens {'are' if held else 'are not'} the best that the engine's logits have"
    yield Check("greedy", held, detail)
