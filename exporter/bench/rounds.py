"""The measurements themselves, in rounds: what is compared is measured in turn, so that a drift hits all alike.

In each round come the machine's limits, the first token after a prompt, and for each context a text of that length and
single tokens after it. The text is random: the time of a step depends on its position and on nothing else, but for the
choice of experts, which random tokens spread.

Letters: B batch rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from exporter.bench.contexts import Plan, position_limit
from exporter.bench.limits import BANDWIDTH, FLOAT_PEAK, INT8_PEAK
from exporter.bench.report import LeftOut
from exporter.machine import seconds
from runtime import Session
from runtime.chunking import Int64Array
from runtime.kernels import Counter, counters

MEASURING = "measuring"
"""The stage that progress reports, in tokens."""

PATIENCE = 600
"""Seconds that reading up to a context may take which nobody asked for."""

_TEXT = 1 << 16

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Counted:
    """What the kernels of one op did in a number of steps. bytes: of weights or of KV buffers."""

    steps: int = 0
    calls: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Samples:
    """Seconds as they come in: to the first token, to read up to a context (with the tokens read), of each step.

    rates: of each limit. counted: by context and op, over all its steps. left_out: what was given up on the way.
    """

    first: list[float] = field(default_factory=list)
    reading: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    steps: dict[int, list[list[float]]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    counted: dict[int, dict[str, Counted]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)


class Text:
    """Random ids of a vocabulary for B rows; the same for the same sizes."""

    def __init__(self, vocabulary: int, batch: int) -> None:
        self._ids_BT = np.random.default_rng(0).integers(0, vocabulary, (batch, _TEXT), dtype=np.int64)

    def at(self, start: int, count: int) -> Int64Array:
        """int64 [B, count]: what stands from position `start` on."""
        return self._ids_BT.take(np.arange(start, start + count), axis=1, mode="wrap")


def warm_up(session: Session, text: Text) -> None:
    """A chunk and single tokens, so that memory is there and caches are full."""
    kv = session.manifest.kv
    session.forward_last(text.at(0, min(kv.chunk, position_limit(kv))))
    for start in range(2):
        session.reset()
        session.forward_last(text.at(start, 1))
    session.reset()


class Rounds:
    """Measures a session that is warm. prompt: tokens before the first new one, or None to leave that out."""

    def __init__(
        self,
        session: Session,
        text: Text,
        plan: Plan,
        *,
        rounds: int,
        prompt: int | None,
        decode_tokens: int,
        progress: Progress | None = None,
    ) -> None:
        self._session, self._text, self._plan = session, text, plan
        self._rounds, self._prompt, self._decode_tokens = rounds, prompt, decode_tokens
        self._progress, self._done = progress, 0
        self._total = (
            rounds * ((prompt or 0) + sum(plan.again) + len(plan.again) * decode_tokens)
            + sum(plan.once) + len(plan.once) * rounds * decode_tokens
        )  # fmt: skip
        self.samples = Samples()

    def measure(self, limit: Callable[[str], float | None]) -> Samples:
        """All rounds. limit: measures a limit by its name, see `exporter.bench.limits`."""
        for _ in range(self._rounds):
            self._measure_limits(limit)
            if self._prompt is not None:
                self._measure_first(self._prompt)
            for context in self._plan.again:
                self._measure_context(context, groups=1)
        for context in self._plan.once:
            self._measure_once(context)
        if self._progress is not None:
            self._progress(MEASURING, self._total, self._total)
        return self.samples

    def _measure_limits(self, limit: Callable[[str], float | None]) -> None:
        for name in (BANDWIDTH, FLOAT_PEAK, INT8_PEAK):
            rate = limit(name)
            if rate is not None:
                self.samples.rates.setdefault(name, []).append(rate)

    def _measure_first(self, prompt: int) -> None:
        rows = self._text.at(0, prompt).tolist()
        self._session.reset()
        self.samples.first.append(seconds(lambda: self._session.generate_batch(rows, max_new_tokens=1)))
        self._report(prompt)

    def _measure_once(self, context: int) -> None:
        """A long context, unless nobody asked for it and reading takes too long."""
        speeds = [tokens / elapsed for readings in self.samples.reading.values() for tokens, elapsed in readings]
        expected = context / max(speeds, default=float("inf"))
        if self._plan.chosen and expected > PATIENCE:
            reason = (
                f"Reading {context:,} tokens would take about {expected / 60:,.0f} minutes here. "
                f"--contexts {context} measures it all the same."
            )
            self.samples.left_out.append(LeftOut(f"context {context:,}", reason))
        else:
            self._measure_context(context, groups=self._rounds)

    def _measure_context(self, context: int, *, groups: int) -> None:
        """A text from its beginning, and what follows it."""
        self._session.reset()
        self.samples.reading.setdefault(context, []).append((context, self._read(context)))
        for group in range(groups):
            self._decode(context, context + group * self._decode_tokens)

    def _read(self, count: int) -> float:
        """Seconds to read the first `count` tokens, in pieces so that progress can be reported."""
        piece = 8 * self._session.manifest.kv.chunk
        total = 0.0
        for start in range(0, count, piece):
            ids_BT = self._text.at(start, min(piece, count - start))
            total += seconds(partial(self._session.forward_last, ids_BT))
            self._report(ids_BT.shape[1])
        return total

    def _decode(self, context: int, start: int) -> None:
        """One group of single tokens."""
        before, times = counters(), []
        for position in range(start, start + self._decode_tokens):
            ids_B1 = self._text.at(position, 1)
            times.append(seconds(partial(self._session.forward_last, ids_B1)))
        self._report(self._decode_tokens)
        self.samples.steps.setdefault(context, []).append(times)
        tally = self.samples.counted.setdefault(context, {})
        for op, more in counted_since(before, steps=len(times)).items():
            old = tally.get(op, Counted())
            tally[op] = Counted(old.steps + more.steps, old.calls + more.calls, old.bytes + more.bytes)

    def _report(self, tokens: int) -> None:
        self._done += tokens
        if self._progress is not None:
            self._progress(MEASURING, min(self._done, self._total - 1), self._total)


def counted_since(before: tuple[Counter, ...], *, steps: int) -> Mapping[str, Counted]:
    """What the kernels have done since `before`, by op, without those that did nothing."""
    old = {counter.op: counter for counter in before}
    found = {}
    for counter in counters():
        was = old.get(counter.op, Counter(counter.op, 0, 0.0, 0))
        if counter.calls > was.calls:
            found[counter.op] = Counted(steps, counter.calls - was.calls, counter.bytes - was.bytes)
    return found
