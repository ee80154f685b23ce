"""What is measured and compared on a GPU, on tiny sizes and a clock on the wall; and the bundles for its engines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.errors import BackendError
from runtime.kernels.cuda.catalogue import TYPICAL_LIMITS, representative_kernels
from runtime.kernels.cuda.launch import DeviceLimits
from tests.gpu import catalogue_checks, engine_checks, plugin_checks, speed_attention, speed_ceilings, speed_experts
from tests.gpu.bench import COPY, MATMUL, Bench, GraphClock, HostClock
from tests.gpu.engine_checks import check_generation, check_logits, read_reference, write_reference
from tests.gpu.findings import Check, Fact, Notebook, Skip, Timing
from tests.gpu.prepare import CHUNK, CONTEXT, reference_of
from tests.support.bundles import exported
from tests.support.cuda_cpu import LIMITS, CpuLauncher


def bench() -> Bench:
    book = Notebook("speed", seed=1, say=lambda line: None)
    return Bench(torch, "cpu", HostClock(), book, CpuLauncher, LIMITS, 1 << 16, small=True)


def test_speeds_are_measured_against_ceilings_of_the_same_run() -> None:
    tried = bench()
    for measure in (speed_ceilings.measure, speed_attention.measure_decode, speed_experts.measure_sampling):
        measure(tried)
    found = tried.book.findings
    failed = [check for check in found if isinstance(check, Check) and not check.held]
    assert not failed
    assert {COPY, MATMUL} <= {fact.name for fact in found if isinstance(fact, Fact)}
    timings = [timing for timing in found if isinstance(timing, Timing)]
    assert len(timings) >= 10
    assert all(timing.microseconds > 0 and timing.share for timing in timings)
    beside = [timing for timing in timings if "beside torch" in timing.name]
    assert beside
    assert all(timing.target == 1 for timing in beside)
    assert not [skip for skip in found if isinstance(skip, Skip) and not skip.expected]


def test_visible_pairs() -> None:
    assert speed_attention.visible_pairs(window=3, tokens=5, start=0) == 1 + 2 + 3 + 3 + 3
    assert speed_attention.visible_pairs(window=4, tokens=2, start=9) == 8


class _FakeCuda:
    """What GraphClock uses of torch.cuda. A step takes 50 µs of its clock, a replay 3 more. graphs: whether it can."""

    def __init__(self, graphs: bool = True) -> None:
        self.now, self.graphs, self.capturing, self.slept = 0.0, graphs, False, 0
        self.eager = self.captured = 0
        cuda = self

        class Stream:
            def wait_stream(self, other: Any) -> None: ...

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at) / 1e3

        class CUDAGraph:
            steps = 0

            def replay(self) -> None:
                assert not cuda.capturing
                cuda.now += 50 * self.steps + 3

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    def step(self) -> None:
        if self.capturing:
            self.captured += 1
        else:
            self.eager += 1
            self.now += 50

    def current_stream(self) -> Any:
        return self.Stream()

    def synchronize(self) -> None:
        assert not self.capturing

    def _sleep(self, cycles: int) -> None:
        self.slept += 1

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        if not self.graphs:
            raise RuntimeError("not here")
        before, self.capturing = self.captured, True
        yield
        self.capturing, graph.steps = False, self.captured - before


def test_the_clock_replays_graphs_of_many_steps() -> None:
    cuda = _FakeCuda()
    taken = GraphClock(type("torch", (), {"cuda": cuda})).median([cuda.step, cuda.step])
    assert cuda.eager == 4, "each step twice to warm up, and all others in graphs"
    assert cuda.captured == 2 + 2 * 10, "one graph to see how long it lasts, one that lasts for a millisecond"
    assert taken == pytest.approx(50 + 3 / 20)


def test_the_clock_does_without_graphs_and_says_so() -> None:
    cuda, said = _FakeCuda(graphs=False), list[str]()
    assert GraphClock(type("torch", (), {"cuda": cuda}), note=said.append).median([cuda.step]) == pytest.approx(50)
    assert cuda.slept
    assert said == ["timed without a graph, since RuntimeError: not here"]


class _Limited:
    """A device that only has limits."""

    def __init__(self, limits: DeviceLimits) -> None:
        self.launcher = type("Launcher", (), {"limits": limits})


@pytest.mark.parametrize("capability", TYPICAL_LIMITS)
def test_there_is_a_case_for_every_kernel_that_builds_ask_for(capability: tuple[int, int]) -> None:
    device: Any = _Limited(TYPICAL_LIMITS[capability])
    book = Notebook("kernels", seed=1, say=lambda line: None)
    kernels = representative_kernels(capability)
    assert [kernel for kernel in kernels if catalogue_checks._run_of(kernel, device, book) is None] == []


def test_engines_are_held_against_the_reference(tmp_path: Path) -> None:
    """A session on the CPU in the place of an engine: within the budget, and not when its logits are others."""
    case = exported(chunk=CHUNK, context=CONTEXT, max_batch=2, dtype="bfloat16", window=7)
    write_reference(tmp_path / "some.npz", reference_of(case))
    reference = read_reference(tmp_path / "some.npz")
    assert [len(row) for row in reference.feeds[-1]] == [1, 1]
    assert any(len(feed[0]) > 1 for feed in reference.feeds)
    session = case.session()
    assert 0 < check_logits(session, reference) <= 1
    check_generation(session, reference)
    truth = [row.copy() for row in reference.truth]
    truth[1][-1, 3] += 1.5 * reference.allowed
    assert check_logits(session, replace(reference, truth=truth)) > 1


def test_what_engines_lack_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Notebook("engine", seed=1, say=lambda line: None)

    def load(name: str) -> None:
        raise BackendError(f"{name} is not installed.") from ModuleNotFoundError(name)

    monkeypatch.setattr(plugin_checks, "load_flavor", load)
    engine_checks.check_engines(book, None, (9, 0))
    plugin_checks.check_plugins(book, lambda: pytest.fail("no device is needed"))
    reasons = [finding.reason for finding in book.findings if isinstance(finding, Skip) and not finding.expected]
    assert reasons == ["none of tensorrt, tensorrt-rtx can be imported here"] * 2


def test_a_library_is_tried_on_a_gpu_that_it_does_not_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it ends its process."""
    plan = tmp_path / "mistral" / "engines" / "some-1" / "decode.plan"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(b"no plan")
    (tmp_path / "mistral.npz").touch()

    class Flavor:
        name, version, runs_on_all = "some", "1.2", ("8.9",)

        def runs_on(self, capability: str) -> bool:
            return capability in self.runs_on_all

    book = Notebook("engine", seed=1, say=lambda line: None)
    monkeypatch.setattr(engine_checks, "installed_flavors", lambda book: [Flavor()])
    engine_checks.check_engines(book, tmp_path, (9, 0))
    skip, fact = book.findings
    assert isinstance(skip, Skip)
    assert "supports compute capability 8.9, and this GPU has 9.0" in skip.reason
    assert isinstance(fact, Fact)
    assert fact.name == "some on 9.0, given mistral's some-1"
    assert "There is no TensorRT flavour 'some'" in fact.value


def test_without_nan() -> None:
    """What the graph checks rely on, for types that numpy does not know."""
    from tests.gpu.graph_checks import _without_nan
    from tests.kernels.cuda.rolling_cases import TYPES

    for dtype in TYPES.values():
        array = np.array([1, np.nan, -2]).astype(dtype)
        np.testing.assert_array_equal(_without_nan(array).astype(np.float32), [1, 0, -2])
