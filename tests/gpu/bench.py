"""Timing: medians of CUDA graphs between CUDA events. On the CPU, for testing this script, a clock on the wall.

torch serves as memory, as the measure of what the device can do, and as the other side of comparisons. Only this part
of the script needs it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.kernels.cuda.device_launcher import DeviceLauncher
from runtime.kernels.cuda.launch import DeviceLimits, Launcher
from tests.gpu.findings import Notebook, Timing

Step = Callable[[], Any]
Timed = Callable[[int], list[float]]
"""Runs something so many times; microseconds of each."""
COPY, READ, MATMUL = "device copy, GB/s", "device read (torch's sum), GB/s", "bf16 matmul, TFLOP/s"
"""Facts that speeds are shares of."""


class Clock(Protocol):
    def median(self, steps: Sequence[Step]) -> float:
        """Microseconds that one of `steps` takes, which differ in their data alone and are run in turn."""
        ...


@dataclass(frozen=True, slots=True)
class GraphClock:
    """On the current CUDA device. torch: the module. quick: fewer repetitions. note: told why there was no graph."""

    torch: Any
    quick: bool = False
    note: Callable[[str], None] = print

    def median(self, steps: Sequence[Step]) -> float:
        """In one graph, as often as to last for a millisecond; replayed until a fifth of a second is over.

        A graph leaves no gaps between launches, in which a device would wait for Python. What cannot be captured is
        queued while the device sleeps.
        """
        stream = self.torch.cuda.Stream()
        stream.wait_stream(self.torch.cuda.current_stream())
        with self.torch.cuda.stream(stream):
            for _ in range(2):  # compiles, loads, chooses algorithms; all that a capture must not
                for step in steps:
                    step()
        self.torch.cuda.synchronize()
        try:
            return self._median(steps, lambda rounds: self._captured(steps, rounds, stream))
        except Exception as error:
            self.torch.cuda.synchronize()
            taken = self._median(steps, lambda rounds: self._queued(steps, rounds))
            self.note(f"timed without a graph, since {type(error).__name__}: {str(error)[:200]}")
            return taken

    def _median(self, steps: Sequence[Step], run_of: Callable[[int], Timed]) -> float:
        run = run_of(1)
        run(2)
        once, rounds = run(3)[-1], 1
        wanted = max(1, min(240 // len(steps), math.ceil(1000 / max(once, 1))))
        if wanted > 1:
            run, rounds, once = run_of(wanted), wanted, once * wanted
        budget = 60_000 if self.quick else 200_000
        count = int(max(7, min(300, budget / max(once, 1))))
        run(max(3, count // 4))  # warm: clocks go up
        return statistics.median(run(count)) / (rounds * len(steps))

    def _captured(self, steps: Sequence[Step], rounds: int, stream: Any) -> Timed:
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(rounds):
                for step in steps:
                    step()

        def run(count: int) -> list[float]:
            graph.replay()
            return self._events(graph.replay, count)

        return run

    def _queued(self, steps: Sequence[Step], rounds: int) -> Timed:
        def all_steps() -> None:
            for _ in range(rounds):
                for step in steps:
                    step()

        def run(count: int) -> list[float]:
            taken = []
            for _ in range(min(count, 20)):
                self.torch.cuda._sleep(20_000_000)  # cycles: longer than Python takes to queue all of it
                taken += self._events(all_steps, 1)
            return taken

        return run

    def _events(self, run: Step, count: int) -> list[float]:
        """Microseconds of each of so many runs, one after the other."""
        torch = self.torch
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in events:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in events]


class HostClock:
    """For testing the script alone."""

    def median(self, steps: Sequence[Step]) -> float:
        taken = []
        for step in steps:
            begun = time.perf_counter()
            step()
            taken.append(1e6 * (time.perf_counter() - begun))
        return statistics.median(taken)


@dataclass(frozen=True, slots=True)
class Bench:
    """torch: the module. where: its name of the device. launcher: on the current stream. cache: bytes of the L2.

    small: sizes for testing the script on a CPU.
    """

    torch: Any
    where: str
    clock: Clock
    book: Notebook
    launcher: Callable[[], Launcher]
    limits: DeviceLimits
    cache: int
    small: bool = False

    def random(self, *shape: int, dtype: str = "bfloat16", scale: float = 1.0) -> Any:
        """Normal numbers on the device, of a type by name; "float8" is e4m3."""
        torch = self.torch
        generator = torch.Generator(device=self.where).manual_seed(self.book.seed % 2**31 + sum(shape))
        kind = {"float8": "float8_e4m3fn"}.get(dtype, dtype)
        made = torch.empty(
            shape, dtype=torch.bfloat16 if dtype == "float8" else getattr(torch, kind), device=self.where
        )
        made.normal_(0, scale, generator=generator)
        return made.to(getattr(torch, kind))

    def empty(self, nbytes: int) -> Any:
        return self.torch.empty((max(nbytes, 256),), dtype=self.torch.uint8, device=self.where)

    def integers(self, values: Any, dtype: str = "int64") -> Any:
        return self.torch.tensor(values, dtype=getattr(self.torch, dtype), device=self.where)

    def rotations(self, nbytes: int) -> int:
        """How many sets of so many bytes are needed that none is in the cache when its turn comes again."""
        return 2 if self.small else max(2, min(48, math.ceil(4 * self.cache / max(nbytes, 1))))

    def ceiling(self, name: str) -> float | None:
        """A fact that was measured before, in this run."""
        value = self.book.known.get(name)
        return None if value is None else float(value)

    def tell_bandwidth(
        self, section: str, name: str, microseconds: float, nbytes: float, target: float | None = None
    ) -> None:
        """A Timing in GB/s, as a share of what a copy on the device reaches."""
        figure, copy = nbytes / microseconds / 1e3, self.ceiling(COPY)
        share = figure / copy if copy else None
        self.book.add(Timing(section, name, microseconds, figure, "GB/s", share, "the copy's bandwidth", target))

    def tell_flops(self, section: str, name: str, microseconds: float, flops: float) -> float:
        """A Timing in TFLOP/s, as a share of what torch's matrix product reaches. Returns the TFLOP/s."""
        figure, ceiling = flops / microseconds / 1e6, self.ceiling(MATMUL)
        share = figure / ceiling if ceiling else None
        self.book.add(Timing(section, name, microseconds, figure, "TFLOP/s", share, "the matrix product's speed"))
        return figure

    def finite(self, name: str, tensor: Any) -> None:
        """A Check that what was timed was computed: all of it is a number, and not all the same."""
        wide = tensor.float()
        well = bool(self.torch.isfinite(wide).all()) and float(wide.std()) > 0
        self.book.check(f"{name} was computed", lambda: None if well else math.inf)

    def against(self, name: str, run: Callable[[], None]) -> None:
        """Run a comparison with something of torch's; what it cannot do is noted and no failure."""
        try:
            run()
        except Exception as error:
            if self.where == "cuda":
                self.torch.cuda.synchronize()
            text = " ".join(str(error).split())[:300]
            self.book.skip(name, f"torch does not do it here: {type(error).__name__}: {text}", expected=True)


def gpu_bench(book: Notebook, quick: bool) -> Bench:
    """On GPU 0. Raises ImportError without torch, RuntimeError where it finds no GPU."""
    import torch

    torch.cuda.set_device(0)
    torch.zeros(1, device="cuda")  # makes the context current

    def launcher() -> Launcher:
        return DeviceLauncher(torch.cuda.current_stream().cuda_stream)

    properties = torch.cuda.get_device_properties(0)
    cache = int(getattr(properties, "L2_cache_size", 0) or 64 << 20)
    clock = GraphClock(torch, quick, lambda said: book.skip("a CUDA graph for timing", said, expected=True))
    return Bench(torch, "cuda", clock, book, launcher, launcher().limits, cache)
