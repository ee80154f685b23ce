"""The measurement: every contestant in turn, round after round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.client import Timing, Worker, WorkerError
from benchmarks.peers.contestants import Contestant
from benchmarks.peers.environments import Environments
from benchmarks.peers.figures import Samples, decode_figure, prefill_figure, rate, ratio
from benchmarks.peers.models import Model
from benchmarks.peers.workers.protocol import made_up
from exporter.machine import ReadBandwidth

_TAKES = 4
"""How often decode at the near and at the far context take turns within a round."""

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. steps: single tokens timed for one sample. far: names of contestants that read the far
    context. keep_free: bytes of memory that must be left for a worker to stay loaded between its turns."""

    rounds: int
    steps: int
    threads: int
    far: tuple[str, ...] = ()
    keep_free: int = 6 * _GIB


class Field:
    """The contestants of one model, and what they gave so far."""

    def __init__(self, environments: Environments, model: Model, plan: Plan, logs: Path) -> None:
        self._environments, self._model, self._plan, self._logs = environments, model, plan, logs
        self._workers: dict[str, Worker] = {}
        self._read = ReadBandwidth(plan.threads)
        self.samples: dict[str, Samples] = {}
        self.bandwidths: list[float] = []

    def run(self, contestants: Sequence[Contestant], paths: dict[str, str]) -> None:
        """All rounds. paths: what each contestant loads, by name; the order turns by one from round to round, and every
        round begins with a measurement of the read bandwidth."""
        for contestant in contestants:
            self.samples[contestant.name] = Samples()
        try:
            for round_ in range(self._plan.rounds):
                self.bandwidths.append(self._read())
                turn = round_ % len(contestants)
                for contestant in (*contestants[turn:], *contestants[:turn]):
                    if contestant.rounds is None or round_ < contestant.rounds:
                        self._turn(contestant, paths[contestant.name], round_)
        finally:
            for worker in self._workers.values():
                worker.close()
            self._workers.clear()

    def _turn(self, contestant: Contestant, path: str, round_: int) -> None:
        name, samples = contestant.name, self.samples[contestant.name]
        if "load" in samples.errors:
            return
        print(f"{self._model.name}, round {round_ + 1}: {name}", file=sys.stderr, flush=True)
        try:
            worker = self._loaded(contestant, path)
        except WorkerError as error:
            samples.errors["load"] = str(error)
            self._drop(name)
            return
        self._long(contestant, worker, round_)
        for tokens in self._model.prefills[:-1]:
            self._prefill(worker, samples, tokens, round_)
        self._decode(worker, samples, self._model.short, round_)
        if name in self._plan.far:
            self._near_and_far(worker, samples, round_)
        finished = round_ + 1 == (contestant.rounds or self._plan.rounds)
        # Whoever has read the far context stays: reading it again takes longer than everything else together.
        if finished or (name not in self._plan.far and _available() < self._plan.keep_free):
            self._drop(name)

    def _loaded(self, contestant: Contestant, path: str) -> Worker:
        samples = self.samples[contestant.name]
        if contestant.name not in self._workers:
            log = self._logs / self._model.name / f"{contestant.slug}.log"
            worker = Worker(self._environments, contestant, threads=self._plan.threads, log=log)
            self._workers[contestant.name] = worker
            samples.load_seconds.append(worker.load(path))
            samples.loaded = samples.loaded or worker.memory()["VmRSS"]
        return self._workers[contestant.name]

    def _long(self, contestant: Contestant, worker: Worker, round_: int) -> None:
        """The longest prompt and the decode after it, before any other text is open."""
        samples, tokens = self.samples[contestant.name], self._model.long
        if contestant.long == "once" and round_ > 0:
            return
        # Who does not keep the text open needs no second slot, which for some engines is a second copy of the weights.
        slot = "long" if contestant.long == "kept" else "short"
        timing = self._timing(worker, samples, slot, tokens, self._plan.steps, round_, contestant.long == "kept")
        if timing is None:
            return
        if timing.prefill is not None:
            samples.rates[prefill_figure(tokens)].append(rate(tokens, timing.prefill))
        samples.rates[decode_figure(tokens)].append(rate(len(timing.steps), sum(timing.steps)))
        samples.after_long = samples.after_long or worker.memory()["VmRSS"]
        for length in (tokens, self._model.far):
            told = worker.kv_bytes(slot, length)
            if told is not None:
                samples.kv_bytes[length] = told

    def _prefill(self, worker: Worker, samples: Samples, tokens: int, round_: int) -> None:
        timing = self._timing(worker, samples, "short", tokens, 0, round_, False)
        if timing is not None and timing.prefill is not None:
            samples.rates[prefill_figure(tokens)].append(rate(tokens, timing.prefill))

    def _decode(self, worker: Worker, samples: Samples, context: int, round_: int) -> None:
        bandwidth = self._read()
        timing = self._timing(worker, samples, "short", context, self._plan.steps, round_, False)
        if timing is not None:
            samples.rates[decode_figure(context)].append(rate(len(timing.steps), sum(timing.steps)))
            samples.bandwidths.append(bandwidth)

    def _near_and_far(self, worker: Worker, samples: Samples, round_: int) -> None:
        """Decode at both contexts a few steps at a time in turn; the far prompt is read once per process."""
        steps = max(1, self._plan.steps // _TAKES)
        seconds = {"near": 0.0, "far": 0.0}
        for _ in range(_TAKES):
            for slot, context in (("near", self._model.near), ("far", self._model.far)):
                timing = self._timing(worker, samples, slot, context, steps, round_, True)
                if timing is None:
                    return
                seconds[slot] += sum(timing.steps)
        for slot, context in (("near", self._model.near), ("far", self._model.far)):
            samples.rates[decode_figure(context)].append(rate(_TAKES * steps, seconds[slot]))
        samples.pairs.append(ratio(seconds["far"], seconds["near"]))

    def _timing(
        self, worker: Worker, samples: Samples, slot: str, tokens: int, steps: int, round_: int, resume: bool
    ) -> Timing | None:
        """One run, unless this engine has failed at it before."""
        what = f"{tokens} tokens"
        if what in samples.errors:
            return None
        ids = made_up(1000 * round_ + tokens + steps, tokens, self._model.shape.vocabulary)
        try:
            return worker.run(slot, ids, steps, resume=resume)
        except WorkerError as error:
            samples.errors[what] = str(error)
            return None

    def _drop(self, name: str) -> None:
        self._workers.pop(name).close()


def _available() -> int:
    """Bytes that new processes can still use."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("/proc/meminfo has no MemAvailable")
