"""The machine: what it is, and the limits that a measurement is compared with, for `cierzo bench` and benchmarks/."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.cores import physical_cores
from runtime.kernels.limits import int8_operations

_MISSING = "not installed"
VERSIONED = ("cierzo", "numpy", "onnx", "onnxruntime", "torch")
BANDWIDTH_BYTES = 512 << 20
"""Far more than a last-level cache holds."""

MATMUL_SIZE = 2048
INT8_ROUNDS = 4_000_000
"""Some 10 milliseconds of a core."""


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, load at the start, and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": physical_cores(),
        "memory_gib": round(_total_memory() / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in VERSIONED},
    }


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or "unknown"


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def installed(*distributions: str) -> dict[str, str]:
    """Versions of those distributions that are installed, Cierzo's source tree included."""
    found = {name: _version(name) for name in distributions}
    return {name: version for name, version in found.items() if version != _MISSING}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "source tree" if distribution == "cierzo" else _MISSING


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """Bytes that process `pid` has in memory: now (VmRSS), of that what no file backs (RssAnon), and at most (VmHWM).

    Empty where the system does not tell (not Linux), and without what an older kernel does not tell.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = dict(re.findall(r"^(VmRSS|RssAnon|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
    return {name: 1024 * int(kib) for name, kib in found.items()}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_threads(threads: int, work: Callable[[int], None]) -> float:
    """Wall time in which `threads` threads each do work(0), work(1), ...; the work must not hold Python's lock."""
    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


class ReadBandwidth:
    """Bytes a second that all cores read together, measured when called.

    Each thread lets the C library's memchr search its share of a block of zeros for a byte that is not there: a vector
    loop that reads everything and writes nothing.
    """

    def __init__(self, threads: int, nbytes: int = BANDWIDTH_BYTES) -> None:
        self._memchr = ctypes.CDLL(None).memchr
        self._memchr.restype = ctypes.c_void_p
        self._memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._block = np.ones(nbytes // 8, dtype=np.int64).view(np.uint8)
        self._block.fill(0)
        self._share = nbytes // threads
        self._threads = threads

    def __call__(self) -> float:
        def read(index: int) -> None:
            begin = self._block.ctypes.data + index * self._share
            if self._memchr(begin, 1, self._share) is not None:
                raise AssertionError("the block of zeros holds a one")

        return self._threads * self._share / in_threads(self._threads, read)


class MatmulPeak:
    """Float32 operations a second of one large square product, measured when called.

    ONNX Runtime's own kernel on `threads` threads, and where these are all cores numpy's BLAS too, if it is faster, so
    that the limit is the machine's and not one library's.
    """

    def __init__(self, threads: int, size: int = MATMUL_SIZE) -> None:
        import onnx.numpy_helper
        import onnx.parser
        import onnxruntime as ort

        self._a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
        self._out = np.empty_like(self._a)
        matrix = f"float[{size},{size}]"
        graph = f"g ({matrix} a) => ({matrix} c) {{ c = MatMul (a, b) }}"
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {graph}')
        model.graph.initializer.append(onnx.numpy_helper.from_array(self._a, "b"))  # constant, hence packed once
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # whatever is measured next needs them
        self._all_cores = threads == physical_cores()
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()  # into memory that is there already
        self._binding.bind_ortvalue_input("a", ort.OrtValue.ortvalue_from_numpy(self._a))
        self._binding.bind_ortvalue_output("c", ort.OrtValue.ortvalue_from_numpy(self._out))
        self._flops = 2.0 * size**3
        self()

    def __call__(self) -> float:
        best = seconds(lambda: self._session.run_with_iobinding(self._binding))
        if self._all_cores:  # numpy cannot be told how many to use
            best = min(best, seconds(lambda: np.matmul(self._a, self._a, out=self._out)))
        return self._flops / best


class Int8Peak:
    """8-bit operations a second of all cores together, in registers only, measured when called; None without kernels.

    A sum of products counts two operations for each product, as in MatmulPeak. The instructions are those that the
    native kernels use on this machine, so that the limit is one that they could reach.
    """

    def __init__(self, threads: int, rounds: int = INT8_ROUNDS) -> None:
        self._threads, self._rounds = threads, rounds

    def __call__(self) -> float | None:
        done: list[int | None] = [0] * self._threads

        def work(index: int) -> None:
            done[index] = int8_operations(self._rounds)

        elapsed = in_threads(self._threads, work)
        counted = [operations for operations in done if operations is not None]
        return sum(counted) / elapsed if len(counted) == self._threads else None
