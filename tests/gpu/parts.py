"""The parts of the script: what each process of it does, and for how long."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from runtime.kernels.cuda.catalogue import representative_kernels
from runtime.kernels.cuda.launch import Kernel
from tests.gpu import attention_checks, expert_checks, graph_checks
from tests.gpu.catalogue_checks import check_kernels
from tests.gpu.device import CheckedDevice, OnGpu, described
from tests.gpu.findings import Notebook
from tests.kernels.cuda.rolling_cases import RollingCase

Item = TypeVar("Item")
KERNELS, SPEED, PLUGINS, ENGINE = "kernels", "speed", "plugins", "engine"
ONNXRUNTIME = "onnxruntime"
SECTIONS = (KERNELS, SPEED, PLUGINS, ENGINE, ONNXRUNTIME)
GRAPH_STEPS = 100


@dataclass(frozen=True, slots=True)
class Task:
    """What a part is told. share, shares: which of so many processes this is, where a part has several.

    bundles: the folder that prepare.py made, if one was brought. work: a folder that the parts of a run share.
    rehearsal: whether there is no GPU, and what would be measured on one is gone through on small sizes.
    """

    book: Notebook
    quick: bool
    compute_capability: tuple[int, int]
    share: int = 0
    shares: int = 1
    bundles: Path | None = None
    work: Path | None = None
    rehearsal: bool = False

    def own(self, items: Iterable[Item]) -> Iterator[Item]:
        """Those of this process."""
        return itertools.islice(items, self.share, None, self.shares)

    def device(self) -> CheckedDevice:
        return OnGpu(self.book.launched)


@dataclass(frozen=True, slots=True)
class Part:
    """seconds, quick_seconds: until it begins nothing new. shares: processes that divide it. Those of KERNELS run at
    once, as most of their time is the CPU's; all others run alone."""

    name: str
    section: str
    run: Callable[[Task], None]
    seconds: int
    quick_seconds: int
    shares: int = 1


def _decode(task: Task) -> None:
    attention_checks.check_decode(task.device(), task.book, task.own(attention_checks.decode_cases(not task.quick)))


def _prefill(task: Task) -> None:
    device = task.device()
    if task.share == 0:
        attention_checks.check_prefill_rules(device, task.book)
    attention_checks.check_prefill(device, task.book, task.own(attention_checks.prefill_cases(not task.quick)))


def _write(task: Task) -> None:
    attention_checks.check_write(task.device(), task.book, task.own(attention_checks.write_cases(not task.quick)))


def _experts(task: Task) -> None:
    device, large = task.device(), not task.quick
    if task.share == 0:
        expert_checks.check_gates(device, task.book, large)
        expert_checks.check_mixture_rules(device, task.book)
    tables = (expert_checks.mixture_cases, expert_checks.packed_cases)
    cases = itertools.chain(*(table(task.book.seed, large) for table in tables))
    expert_checks.check_mixtures(device, task.book, task.own(cases))


def _sampling(task: Task) -> None:
    expert_checks.check_top(task.device(), task.book, not task.quick)


def _every_kernel(task: Task) -> None:
    check_kernels(task.device(), task.book, task.own(representative_kernels(task.compute_capability)))


def _graph(task: Task) -> None:
    device = task.device()
    for ring, heads in (("bfloat16", 8), ("float8", 8), ("bfloat16", 2)):
        case = RollingCase(300, 340, (290, 0, 2**31), (1, 1, 1), heads=heads, head_dim=64, ring=ring)
        task.book.check(
            f"a graph of a decode step replayed {GRAPH_STEPS} times, {ring} rings, {heads} heads",
            partial(graph_checks.check_graph, device, case, GRAPH_STEPS, task.book.seed),
        )


def _speed(name: str) -> Callable[[Task], None]:
    def run(task: Task) -> None:
        from tests.gpu import speed_attention, speed_ceilings, speed_experts
        from tests.gpu.bench import gpu_bench

        measures = {
            "ceilings": speed_ceilings.measure,
            "decode speed": speed_attention.measure_decode,
            "prefill speed": speed_attention.measure_prefill,
            "experts speed": speed_experts.measure_experts,
            "sampling speed": speed_experts.measure_sampling,
        }
        measures[name](gpu_bench(task.book, task.quick))

    return run


def _plugins(task: Task) -> None:
    from tests.gpu.plugin_checks import check_plugins
    from tests.support.kernel_devices import GpuDevice

    check_plugins(task.book, GpuDevice)


def _engine(task: Task) -> None:
    from tests.gpu.engine_checks import check_engines

    check_engines(task.book, task.bundles, task.compute_capability)


def _onnxruntime(name: str) -> Callable[[Task], None]:
    def run(task: Task) -> None:
        from tests.gpu.ort_parts import run_part

        run_part(name, task)

    return run


PARTS = (
    Part("every kernel", KERNELS, _every_kernel, 110, 45, shares=3),
    Part("decode", KERNELS, _decode, 110, 30, shares=4),
    Part("prefill", KERNELS, _prefill, 110, 30, shares=4),
    Part("write", KERNELS, _write, 60, 30, shares=2),
    Part("experts", KERNELS, _experts, 90, 30, shares=2),
    Part("sampling", KERNELS, _sampling, 60, 30),
    Part("graph", KERNELS, _graph, 90, 40),
    Part("ceilings", SPEED, _speed("ceilings"), 30, 15),
    Part("decode speed", SPEED, _speed("decode speed"), 60, 20),
    Part("prefill speed", SPEED, _speed("prefill speed"), 40, 10),
    Part("experts speed", SPEED, _speed("experts speed"), 40, 10),
    Part("sampling speed", SPEED, _speed("sampling speed"), 40, 10),
    Part("plugins", PLUGINS, _plugins, 40, 20),
    Part("engine", ENGINE, _engine, 90, 30),
    Part("onnxruntime twins", ONNXRUNTIME, _onnxruntime("twins"), 110, 60),
    Part("onnxruntime ceilings", ONNXRUNTIME, _onnxruntime("ceilings"), 30, 15),
    Part("onnxruntime dense", ONNXRUNTIME, _onnxruntime("dense"), 130, 90),
    Part("onnxruntime beside transformers", ONNXRUNTIME, _onnxruntime("rival"), 170, 120),
    Part("onnxruntime mixture", ONNXRUNTIME, _onnxruntime("mixture"), 150, 90),
)


def missing_kernels(compute_capability: tuple[int, int], launched: Iterable[str]) -> list[str]:
    """Kernels that builds ask for and that no check has run."""
    known: tuple[Kernel, ...] = representative_kernels(compute_capability)
    ran = set(launched)
    return [described(kernel) for kernel in known if described(kernel) not in ran]
