"""The real onnxruntime-gpu in a process of its own, on the stand-in for a GPU (tests/support/cuda_stand_in).

In a process of its own since its wheel unpacks into the same package as the CPU wheel's, which is installed beside the
tests; so it lies in a folder of its own, and only such a process finds it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cuda_stand_in import JOURNAL, Event, read_journal, stand_in_libraries
from tests.support.cuda_stand_in.journal import ARGUMENTS, CAPABILITY, MARK, NO_DEVICE

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "CIERZO_ONNXRUNTIME_GPU"
"""Environment variable: a folder with onnxruntime-gpu, where the virtual environment does not have its own."""
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
H100 = "9.0"
Counts = Mapping[str, Mapping[str, int]]


def gpu_wheel() -> Path:
    """The folder with the onnxruntime package of onnxruntime-gpu. Raises AssertionError where it was not fetched.

    Skips the test on machines that there is no wheel for.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("onnxruntime-gpu is there for Linux on x86-64 alone (in this form)")
    own = Path(sys.prefix) / "onnxruntime-gpu"
    folder = own if provider_library(own).exists() else Path(os.environ.get(WHEEL, own))
    assert provider_library(folder).exists(), (
        f"There is no onnxruntime-gpu in {folder}. `make setup` fetches it; for another virtual environment: "
        f"python -m pip install --no-deps --target {own} onnxruntime-gpu==VERSION, with the VERSION in the Makefile, "
        f"or name a folder that has it in {WHEEL}."
    )
    return folder


def provider_library(wheel: Path) -> Path:
    return wheel / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"


@dataclass(frozen=True, slots=True)
class Ran:
    """A process that ended well. answer: what it answered. output: standard output and error together."""

    answer: Any
    events: tuple[Event, ...]
    output: str

    def after(self, mark: str) -> tuple[Event, ...]:
        """The events between this mark and the next. Raises KeyError if the process did not come to it."""
        found: list[Event] | None = None
        for event in self.events:
            if event.kind == MARK:
                if found is not None:
                    break
                found = [] if event.what == mark else None
            elif found is not None:
                found.append(event)
        if found is None:
            raise KeyError(mark)
        return tuple(found)


def run_python(
    source: str,
    job: Any = None,
    *,
    stand_in: bool = True,
    compute_capability: str | None = H100,
    environment: Mapping[str, str] | None = None,
) -> Ran:
    """Run Python in a process where `import onnxruntime` is onnxruntime-gpu.

    source: finds `job` (JSON) and leaves `answer` (JSON); `mark(text)` writes a mark between the events. stand_in:
    False for the machine's own libraries of CUDA, which are none in CI. compute_capability: one of
    cuda_stand_in.CAPABILITIES, or None for CUDA without a device.

    Raises AssertionError, with what it printed, if it ends otherwise than well.
    """
    wheel = gpu_wheel()
    libraries = [str(stand_in_libraries(provider_library(wheel)))] if stand_in else []
    with tempfile.TemporaryDirectory() as folder:
        journal, answer = Path(folder) / "journal", Path(folder) / "answer"
        asked = Path(folder) / "job"
        asked.write_text(json.dumps({"source": source, "job": job, "answer": str(answer)}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.onnxruntime_gpu_child", str(asked)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd=ROOT,
            env={
                **os.environ,
                **(environment or {}),
                "PYTHONPATH": os.pathsep.join([str(wheel), str(ROOT)]),
                "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]).strip(":"),
                JOURNAL: str(journal),
                CAPABILITY: NO_DEVICE if compute_capability is None else compute_capability,
            },
        )
        events = read_journal(journal)
        assert done.returncode == 0, f"ended with {done.returncode} after {events[-3:]}:\n{done.stdout[-8000:]}"
        return Ran(json.loads(answer.read_text(encoding="utf-8")), events, done.stdout)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a graph's nodes run. assigned: provider -> op -> nodes, functions inlined, before nodes are fused.

    executed: op -> nodes of the graph as it is run, fused, with the copies ("MemcpyToHost") between providers.

    error: of the session's making, with nothing else then.
    """

    error: str | None
    assigned: Counts
    executed: Mapping[str, int]


def place(graph: bytes | Path, *, optimized: bool = True) -> Placement:
    """Where the CUDA provider and, for what that has no kernel for, the CPU provider run the graph's nodes.

    optimized: whether ONNX Runtime may rewrite the graph.
    """
    return place_all([graph], optimized=optimized)[0]


def place_all(graphs: Sequence[bytes | Path], *, optimized: bool = True) -> list[Placement]:
    """`place` of several graphs in one process."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            {
                "graph": _file(graph, Path(folder), index),
                "executed": str(Path(folder) / f"executed{index}.onnx"),
                "optimized": optimized,
            }
            for index, graph in enumerate(graphs)
        ]
        code = "from tests.support.onnxruntime_gpu_child import place\nanswer = [place(one) for one in job]"
        ran = run_python(code, jobs)
        nodes = [
            [] if said["error"] else onnx.load(str(job["executed"]), load_external_data=False).graph.node
            for said, job in zip(ran.answer, jobs, strict=True)
        ]
    return [
        Placement(said["error"], said["assigned"], dict(Counter(node.op_type for node in executed)))
        for said, executed in zip(ran.answer, nodes, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Step:
    """A graph to be run with all its inputs and outputs bound to memory of the GPU.

    graph: the model, or its file. sizes: of its symbolic dims. values: contents of inputs, otherwise zeros; what the
    GPU computes is never seen. on_host: inputs that are bound to memory of the host. shares: output -> input or other
    output whose memory it is bound to. constants: initializers that the session is given, in numpy's types or those of
    ml_dtypes. runs: how often. options: further ones of the provider. optimized: whether ONNX Runtime may rewrite the
    graph. cpu_fallback: whether nodes may run on the CPU.
    """

    graph: bytes | Path
    sizes: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    on_host: Collection[str] = ()
    shares: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    cuda_graph: bool = False
    runs: int = 1
    options: Mapping[str, str] = field(default_factory=dict)
    optimized: bool = True
    cpu_fallback: bool = False


@dataclass(frozen=True)
class Observed:
    """What became of a Step. error: of the session's making or of a run; the rest is what there was until then.

    assigned: as Placement's. making: events while the session was made. running: events of each run.
    """

    error: str | None
    assigned: Counts
    making: tuple[Event, ...]
    running: tuple[tuple[Event, ...], ...]

    def _all(self, kind: str) -> list[Event]:
        return [event for events in self.running for event in events if event.kind == kind]

    @cached_property
    def launches(self) -> tuple[str, ...]:
        """Names of the kernels launched by all runs; "blas NAME" for products by cuBLAS."""
        kinds = {"launch": "", "blas": "blas "}
        return tuple(kinds[e.kind] + e.what for events in self.running for e in events if e.kind in kinds)

    @cached_property
    def copies(self) -> tuple[Event, ...]:
        return tuple(self._all("copy"))

    @cached_property
    def syncs(self) -> tuple[Event, ...]:
        return tuple(self._all("sync"))

    @cached_property
    def allocations(self) -> tuple[Event, ...]:
        return tuple(self._all("allocate"))

    @cached_property
    def violations(self) -> tuple[str, ...]:
        """What a GPU would have refused."""
        return tuple(event.what for event in (*self.making, *self._all("violation")) if event.kind == "violation")

    @cached_property
    def during_capture(self) -> tuple[Event, ...]:
        return tuple(e for events in self.running for e in events if e.captured and e.kind != "capture")

    @cached_property
    def captured(self) -> bool:
        """Whether a run was captured, unspoilt, and the last run was a launch of the graph."""
        ends = [event.what for event in self._all("capture")]
        return ends == ["begin", "end"] and any(event.kind == "graph" for event in self.running[-1])


def run_step(step: Step, *, compute_capability: str = H100) -> Observed:
    """Make a session on the CUDA provider and run it."""
    return run_steps([step], compute_capability=compute_capability)[0]


def run_steps(steps: Sequence[Step], *, compute_capability: str = H100, arguments: str = "") -> list[Observed]:
    """`run_step` of several steps in one process, which takes less time than a process for each.

    arguments: a part of the names of kernels whose first argument is to be written down.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_job(step, Path(folder), index) for index, step in enumerate(steps)]
        code = "from tests.support.onnxruntime_gpu_child import run_step\nanswer = [run_step(one) for one in job]"
        shown = {ARGUMENTS: arguments} if arguments else {}
        ran = run_python(code, jobs, compute_capability=compute_capability, environment=shown)
    return [
        Observed(
            said["error"],
            said["assigned"],
            ran.after(f"{index} making"),
            tuple(ran.after(f"{index} run {run}") for run in range(said["begun"])),
        )
        for index, said in enumerate(ran.answer)
    ]


def _file(graph: bytes | Path, folder: Path, index: int) -> str:
    if isinstance(graph, Path):
        return str(graph)
    path = folder / f"graph{index}.onnx"
    path.write_bytes(graph)
    return str(path)


def _job(step: Step, folder: Path, index: int) -> dict[str, Any]:
    # Types that numpy does not know come back from its files as bytes: all arrays go as bytes, with type and shape.
    arrays = {**step.values, **step.constants}
    path = folder / f"arrays{index}.npz"
    plain: dict[str, Any] = {name: np.frombuffer(value.tobytes(), np.uint8) for name, value in arrays.items()}
    np.savez(path, **plain)
    return {
        "label": str(index),
        "graph": _file(step.graph, folder, index),
        "arrays": str(path),
        "values": {name: [value.dtype.name, list(value.shape)] for name, value in step.values.items()},
        "constants": {name: [value.dtype.name, list(value.shape)] for name, value in step.constants.items()},
        "sizes": dict(step.sizes),
        "on_host": list(step.on_host),
        "shares": dict(step.shares),
        "runs": step.runs,
        "options": {"enable_cuda_graph": "1" if step.cuda_graph else "0", **step.options},
        "optimized": step.optimized,
        "cpu_fallback": step.cpu_fallback,
    }
