"""The machine: what it is, and the limits that a measurement is compared with."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort

from runtime.backends.cores import physical_cores

VERSIONED = ("cierzo", "numpy", "onnx", "onnxruntime", "torch")
_BANDWIDTH_BYTES = 512 << 20
"""Far more than a last-level cache holds."""

_MATMUL_SIZE = 2048


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, load at the start, and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": physical_cores(),
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
        "load_average": round(_load_average(), 2),
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


def _meminfo(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 1024 * int(match.group(1)) if match else 0


def _load_average() -> float:
    return float(Path("/proc/loadavg").read_text().split()[0])


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "source tree" if distribution == "cierzo" else "not installed"


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """Bytes resident in process `pid`: all of them (VmRSS), and the anonymous part (RssAnon), which no file backs."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|RssAnon):\s+(\d+) kB$", status, re.MULTILINE))
    return {name: 1024 * int(kib) for name, kib in found.items()}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class ReadBandwidth:
    """Bytes a second that all cores read together, measured when called.

    Each thread lets the C library's memchr search its share of a block of zeros for a byte that is not there: a vector
    loop that reads everything and writes nothing.
    """

    def __init__(self, threads: int, nbytes: int = _BANDWIDTH_BYTES) -> None:
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

        workers = [threading.Thread(target=read, args=(index,)) for index in range(self._threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return self._threads * self._share / (time.perf_counter() - began)


class MatmulPeak:
    """Float32 operations a second of one large square product, measured when called.

    The better of numpy's BLAS and of ONNX Runtime's own kernel with the same number of threads, so that the limit is
    the machine's and not one library's.
    """

    def __init__(self, threads: int, size: int = _MATMUL_SIZE) -> None:
        self._a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
        self._out = np.empty_like(self._a)
        matrix = f"float[{size},{size}]"
        graph = f"g ({matrix} a) => ({matrix} c) {{ c = MatMul (a, b) }}"
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {graph}')
        model.graph.initializer.append(onnx.numpy_helper.from_array(self._a, "b"))  # constant, hence packed once
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()  # into memory that is there already
        self._binding.bind_ortvalue_input("a", ort.OrtValue.ortvalue_from_numpy(self._a))
        self._binding.bind_ortvalue_output("c", ort.OrtValue.ortvalue_from_numpy(self._out))
        self._flops = 2.0 * size**3
        self()

    def __call__(self) -> float:
        blas = seconds(lambda: np.matmul(self._a, self._a, out=self._out))
        kernel = seconds(lambda: self._session.run_with_iobinding(self._binding))
        return self._flops / min(blas, kernel)
