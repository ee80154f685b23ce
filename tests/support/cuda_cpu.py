"""CUDA kernels on the CPU: the same sources against a stand-in for their device header, compiled by a C++ compiler.

What it cannot show is speed, and what only a GPU's memory order brings up between blocks: blocks run one after the
other here. Within a block it is stricter than a GPU: see tests/support/cuda_on_cpu/block.h.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel

SOURCES = Path(__file__).resolve().parents[2] / "runtime" / "kernels" / "cuda"
STAND_IN = Path(__file__).resolve().parent / "cuda_on_cpu"
LIMITS = DeviceLimits(multiprocessors=6, shared_bytes=227 << 10, compute_capability=(9, 0))
"""Shared memory of a Hopper GPU, and few enough multiprocessors that a small problem fills them."""
CHECKS = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-x", "c++", "-DCIERZO_ON_CPU"),
    # Kernels see bytes of shared memory as any type; a GPU's compiler does not take that for an error. Sums keep the
    # order and rounding that the source says, whatever the processor.
    *("-fno-strict-aliasing", "-ffp-contract=off", "-frounding-math", "-fvisibility=hidden", "-Wno-unknown-pragmas"),
    *(f"-fsanitize={CHECKS}", "-fsanitize-undefined-trap-on-error"),
)


class KernelFault(AssertionError):
    """A kernel did what a GPU would not survive or might not; or it does not compile."""


class _Launch(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("shared_bytes", ctypes.c_uint64),
        ("params_bytes", ctypes.c_uint64),
        ("error_bytes", ctypes.c_uint64),
        ("error", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
    ]


class CpuLauncher:
    """Runs kernels on the CPU, at once, in an order of threads and blocks that `seed` draws.

    Another seed must give the same bits. seed: by default what CIERZO_KERNEL_SEED says, or 0. sources: the folder of
    kernels' .cu files. Raises KernelFault with what a kernel did wrong and where.
    """

    def __init__(self, limits: DeviceLimits = LIMITS, *, seed: int | None = None, sources: Path = SOURCES) -> None:
        compiler()
        self._limits = limits
        self._sources = sources
        self._seeds = itertools.count((int(os.environ.get("CIERZO_KERNEL_SEED", "0")) if seed is None else seed) << 20)

    @property
    def limits(self) -> DeviceLimits:
        return self._limits

    def launch(
        self, kernel: Kernel, *, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        if shared_bytes > self._limits.shared_bytes:
            raise BackendError(
                f"{kernel.name} asks for {shared_bytes} bytes of shared memory, and the device has "
                f"{self._limits.shared_bytes} for a block."
            )
        library = compile_on_cpu(kernel, self._sources)
        error = ctypes.create_string_buffer(1024)
        asked = _Launch(
            seed=next(self._seeds),
            shared_bytes=shared_bytes,
            params_bytes=ctypes.sizeof(params),
            error_bytes=len(error),
            error=ctypes.cast(error, ctypes.c_char_p),
            grid=grid,
            threads=threads,
        )
        if _entry(library, kernel.name)(ctypes.addressof(asked), ctypes.addressof(params)):
            raise KernelFault(_with_line(library, error.value.decode(errors="replace")))


@functools.cache
def compiler() -> str:
    """Of C++. Skips the test where there is none, as the kernels of the CPU are skipped where there is none of C."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    import pytest  # here, since the checks on a GPU read this file on machines without it

    raise pytest.skip.Exception(
        "there is no C++ compiler, so CUDA kernels cannot be tested on the CPU", allow_module_level=True
    )


def compile_on_cpu(kernel: Kernel, sources: Path = SOURCES) -> Path:
    """The library that holds the kernel, compiled once for the same sources, definitions and compiler."""
    return _compiled(kernel.source, tuple(kernel.definitions.items()), sources)


@functools.cache
def _compiled(source: str, definitions: tuple[tuple[str, str | int], ...], sources: Path) -> Path:
    defined = [f"-D{name}={value}" for name, value in definitions]
    key = hashlib.sha256(repr((_compiler_version(), FLAGS, defined, source)).encode())
    for file in (sources / source, *sorted({*SOURCES.glob("*.cuh"), *sources.glob("*.cuh"), *STAND_IN.glob("*.h")})):
        key.update(hashlib.sha256(file.read_bytes()).digest())
    folder = Path(tempfile.gettempdir()) / f"cierzo-kernels-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{Path(source).stem}-{key.hexdigest()[:32]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as own:  # several processes may compile it at once: the last one stays
        built = Path(own) / library.name
        includes = [f"-I{sources}", f"-I{SOURCES}", f"-I{STAND_IN}"]
        command = [*compiler().split(), *FLAGS, *defined, *includes, str(sources / source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelFault(f"{source} does not compile on the CPU with {defined}:\n{done.stderr[:8000]}")
        built.replace(library)
    return library


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([*compiler().split(), "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _entry(library: Path, name: str) -> Callable[[int, int], int]:
    entry = getattr(ctypes.CDLL(str(library)), name)
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    entry.restype = ctypes.c_int
    return entry  # type: ignore[no-any-return]


def _with_line(library: Path, text: str) -> str:
    """The text with its instruction's address, if it has one, turned into lines of the source where a tool can."""
    found = re.search(r" \[at (-?\d+)\]$", text)
    if found is None:
        return text
    text = text[: found.start()]
    if (nm := shutil.which("nm")) is None or (addr2line := shutil.which("addr2line")) is None:
        return text
    symbols = subprocess.run([nm, "-C", str(library)], capture_output=True, text=True, check=False).stdout
    base = re.search(r"^([0-9a-f]+) \w on_cpu::run_thread\(\)$", symbols, re.MULTILINE)
    if base is None:
        return text
    address = hex(int(base[1], 16) + int(found[1]))
    line = subprocess.run([addr2line, "-s", "-e", str(library), address], capture_output=True, text=True, check=False)
    return f"{text}, in {line.stdout.strip()}"
