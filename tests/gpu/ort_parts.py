"""The parts of the section onnxruntime, by name."""

from __future__ import annotations

from tests.gpu import ort_parity
from tests.gpu.bench import COPY, Bench, HostClock, gpu_bench
from tests.gpu.parts import Task


def run_part(name: str, task: Task) -> None:
    """One part. Raises ImportError where a package is missing, as parts do."""
    if name == "twins":
        ort_parity.check_twins(task.book, task.bundles)
        return
    bench = _bench(task)
    if name == "ceilings":
        from tests.gpu import speed_ceilings

        if bench.ceiling(COPY) is None:  # else the section `speed` measured them in this run
            speed_ceilings.measure(bench)
        return
    from tests.gpu.ort_rival import compare
    from tests.gpu.ort_speed import DENSE, MIXTURE, measure_dense, measure_mixture
    from tests.gpu.ort_weights import read_shape

    folder = ort_parity.prepared(task.book, task.bundles, "large")
    if folder is None:
        return
    assert task.work is not None
    run, shape = {"dense": (measure_dense, DENSE), "rival": (compare, DENSE), "mixture": (measure_mixture, MIXTURE)}[
        name
    ]
    if not (folder / f"{shape}.json").is_file():
        task.book.skip(shape, f"{folder} does not hold it; {ort_parity.PREPARE}")
        return
    run(bench, folder, read_shape(folder, shape), task.work)


def _bench(task: Task) -> Bench:
    if not task.rehearsal:
        return gpu_bench(task.book, task.quick)
    import torch

    from tests.support.cuda_cpu import LIMITS, CpuLauncher

    return Bench(torch, "cpu", HostClock(), task.book, CpuLauncher, LIMITS, 1 << 16, small=True)
