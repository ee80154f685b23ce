"""Is the sliding window kept? A small checkpoint with real windows, texts far longer than they are, two questions.

Same: does the engine's answer equal that of transformers in float32, past the window as within it? Asked of float32
only, since four bits of random weights answer something else anyway.
Blind: does the answer stay as it is when the tokens that no window reaches any more are replaced? That needs neither a
reference nor exactness, so it is asked of every format: whoever still sees those tokens answers differently.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.client import Worker, WorkerError
from benchmarks.peers.contestants import Contestant
from benchmarks.peers.environments import Environments
from benchmarks.peers.figures import log_probability, relative_difference
from benchmarks.peers.models import WINDOW_CHECK
from benchmarks.peers.workers.protocol import made_up

TEXTS = 4
WINDOWS = 5
"""The texts are this many windows long."""

KEPT = 0.02
"""Relative difference up to which two answers count as the same: caches in 16 and in 8 bits round a little."""

Answer = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """within, past: relative difference from transformers after a text of one window, and of five. seen: relative
    change of the answer when tokens out of reach change. Each is the largest over the texts, and None where the engine
    failed or nothing was compared; error: what the engine said."""

    within: float | None = None
    past: float | None = None
    seen: float | None = None
    error: str | None = None

    @property
    def words(self) -> str:
        """The verdict in a word or two."""
        if self.seen is None:
            return "fails past it"
        if self.seen > KEPT:
            return "ignored"
        return "kept" if self.past is None or self.past <= KEPT else "wrong"


@dataclass(frozen=True, slots=True)
class _Text:
    """Three prompts: one window, five windows, and those five with other tokens where no window reaches."""

    short: list[int]
    long: list[int]
    altered: list[int]


def check(
    environments: Environments, contestants: Sequence[Contestant], paths: Mapping[str, str], logs: Path
) -> dict[str, Verdict]:
    """The verdict on every contestant of `paths`; the first one is the reference."""
    texts = list(_texts())
    reference: list[tuple[Answer, Answer]] = []
    verdicts = {}
    for contestant in contestants:
        print(f"window check: {contestant.name}", file=sys.stderr, flush=True)
        worker = Worker(environments, contestant, threads=1, log=logs / "window" / f"{contestant.slug}.log")
        try:
            worker.load(paths[contestant.name])
            if not reference:
                reference = [(worker.answer(text.short), worker.answer(text.long)) for text in texts]
            verdicts[contestant.name] = _verdict(worker, texts, reference if contestant.bits == 32 else None)
        except WorkerError as error:
            verdicts[contestant.name] = Verdict(error=str(error))
        finally:
            worker.close()
    return verdicts


def _texts() -> Iterator[_Text]:
    shape = WINDOW_CHECK
    reach = shape.layers * (shape.window - 1) + 1  # tokens that the last answer depends on
    for index in range(TEXTS):
        long = made_up(2 * index, WINDOWS * shape.window, shape.vocabulary)
        others = made_up(2 * index + 1, len(long) - reach, shape.vocabulary)
        yield _Text(long[-shape.window :], long, others + long[-reach:])


def _verdict(worker: Worker, texts: Sequence[_Text], reference: Sequence[tuple[Answer, Answer]] | None) -> Verdict:
    within = None
    if reference is not None:
        shorts = [worker.answer(text.short) for text in texts]
        within = max(difference(answer, right) for answer, (right, _) in zip(shorts, reference, strict=True))
    try:
        longs = [worker.answer(text.long) for text in texts]
        changed = [worker.answer(text.altered) for text in texts]
    except WorkerError as error:
        return Verdict(within, error=str(error))
    past = None
    if reference is not None:
        past = max(difference(answer, right) for answer, (_, right) in zip(longs, reference, strict=True))
    return Verdict(within, past, max(difference(*pair) for pair in zip(changed, longs, strict=True)))


def difference(answer: Answer, reference: Answer) -> float:
    """Between logits: the largest difference over the largest logit. An engine that only names the next token: how far
    its log-probability is from the reference's for that token, over the latter; 1 where the two name different tokens
    and neither shows logits."""
    if "logits" in answer and "logits" in reference:
        return relative_difference(answer["logits"], reference["logits"])
    token = answer["token"]
    if "logits" in reference:
        right = log_probability(reference["logits"], token)
    elif reference["token"] == token:
        right = reference["logprob"]
    else:
        return 1.0
    return abs(float(answer["logprob"]) - right) / abs(right)
