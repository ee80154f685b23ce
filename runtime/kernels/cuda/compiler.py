"""Compiles a CUDA kernel for one architecture with NVRTC, once: the result is kept on disk.

No GPU, no CUDA toolkit and no nvcc is needed, only the packages cuda-core and nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import Kernel

SUPPORTED_ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
"""Compute capabilities that the kernels are compiled and tested for."""
SOURCES = Path(__file__).resolve().parent
_OPTIONS = ("-std=c++17", "-fmad=false", "ptxas -v")
_FORM = "cierzo cubin 1"
_HEADER = struct.Struct("<32s3I")
"""Of a cache entry: SHA-256 of all that follows it, registers, bytes spilled, bytes of stack; then the machine code."""


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """Machine code for one architecture, and what a thread of the kernel needs.

    registers: of 32 bits. spilled_bytes: stored to and loaded from local memory as registers ran out. stack_bytes: of
    local memory in all, which arrays that are indexed at run time take too.
    """

    kernel: Kernel
    cubin: bytes
    registers: int
    spilled_bytes: int
    stack_bytes: int


def architecture(compute_capability: tuple[int, int]) -> str:
    """Its name for the compiler, such as "sm_90". Raises BackendError if it is none of SUPPORTED_ARCHITECTURES."""
    if compute_capability not in SUPPORTED_ARCHITECTURES:
        raise BackendError(
            "Cierzo's CUDA kernels are made for GPUs of compute capability "
            f"{', '.join(f'{major}.{minor}' for major, minor in SUPPORTED_ARCHITECTURES)}, not "
            f"{'.'.join(map(str, compute_capability))}. Build without plugins for this GPU."
        )
    return f"sm_{compute_capability[0]}{compute_capability[1]}"


def cache_folder() -> Path:
    """Where compiled kernels are kept: under $CIERZO_CACHE, or else where the platform keeps caches."""
    if given := os.environ.get("CIERZO_CACHE"):
        return Path(given) / "kernels"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "cierzo" / "kernels"


def compile_kernel(
    kernel: Kernel, compute_capability: tuple[int, int], *, sources: Path = SOURCES, cache: Path | None = None
) -> CompiledKernel:
    """The kernel for one architecture, from the cache if it is there.

    An entry is named by the SHA-256 of all that it depends on: the source, every header beside it, definitions,
    architecture, options and NVRTC's version. Entries are written whole or not at all, so any number of processes may
    share a cache; one that is damaged is made again. cache: by default `cache_folder()`.

    Raises BackendError if the architecture is not supported, if NVRTC is not installed, with NVRTC's messages if the
    kernel does not compile, and if the cache cannot be written.
    """
    name = architecture(compute_capability)
    entry = (cache or cache_folder()) / f"{Path(kernel.source).stem}-{name}-{_key(kernel, name, sources)}.cubin"
    found = _read(entry, kernel)
    if found is None:
        found = _compile(kernel, name, sources)
        _write(entry, found)
    return found


def _nvrtc() -> tuple[Any, Any, tuple[int, int]]:
    """cuda.core's Program and ProgramOptions, and NVRTC's version."""
    try:
        from cuda.bindings import nvrtc

        try:
            from cuda.core import Program, ProgramOptions
        except ImportError:  # before 0.5 it was there
            from cuda.core.experimental import Program, ProgramOptions
        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package finds no library
        raise BackendError(
            f"CUDA kernels are compiled by NVRTC, which cannot be loaded here ({_first_line(error)}). Install "
            'cuda-core, cuda-bindings and nvidia-cuda-nvrtc: `pip install "cierzo[cuda-kernels]"`.'
        ) from error
    if int(status) != 0:
        raise BackendError(f"NVRTC does not tell its version ({status.name}). Install nvidia-cuda-nvrtc again.")
    return Program, ProgramOptions, (major, minor)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _folders(sources: Path) -> Sequence[Path]:
    return (sources,) if sources == SOURCES else (sources, SOURCES)


def _key(kernel: Kernel, name: str, sources: Path) -> str:
    _, _, version = _nvrtc()
    described = (_FORM, _OPTIONS, version, name, kernel.source, kernel.name, tuple(kernel.definitions.items()))
    key = hashlib.sha256(repr(described).encode())
    for file in (sources / kernel.source, *(file for folder in _folders(sources) for file in _headers(folder))):
        key.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return key.hexdigest()


def _headers(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cuh"))


def _compile(kernel: Kernel, name: str, sources: Path) -> CompiledKernel:
    program_type, options_type, _ = _nvrtc()
    log = io.StringIO()
    try:
        options = options_type(
            name=kernel.source,
            arch=name,
            std="c++17",
            fma=False,  # the sources spell out where a product and a sum round once, and so do the tests on the CPU
            ptxas_options=["-v"],
            include_path=[str(folder) for folder in _folders(sources)],
            define_macro=[(key, str(value)) for key, value in kernel.definitions.items()] or None,
        )
        program = program_type((sources / kernel.source).read_text(encoding="utf-8"), "c++", options)
        cubin = bytes(program.compile("cubin", logs=log).code)
        program.close()
    except Exception as error:  # cuda-core has no exception of its own that is public
        raise BackendError(
            f"The kernel {kernel.name} of {kernel.source} does not compile for {name} with "
            f"{dict(kernel.definitions)}: {str(error).strip(chr(0)).strip()}"
        ) from error
    return CompiledKernel(kernel, cubin, *_resources(log.getvalue(), kernel, name))


def _resources(log: str, kernel: Kernel, name: str) -> tuple[int, int, int]:
    """Registers, bytes spilled and bytes of stack, out of what ptxas says of this kernel."""
    said = re.search(
        rf"Function properties for {re.escape(kernel.name)}\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
        log,
    )
    if said is None:
        raise BackendError(
            f"{kernel.source} holds no kernel {kernel.name} when compiled for {name}. {log.strip(chr(0))}"
        )
    stack, stores, loads, registers = map(int, said.groups())
    return registers, stores + loads, stack


def _read(entry: Path, kernel: Kernel) -> CompiledKernel | None:
    """What a cache entry holds; None if it is absent or damaged."""
    try:
        data = entry.read_bytes()
    except OSError:
        return None
    if len(data) < _HEADER.size:
        return None
    digest, *resources = _HEADER.unpack_from(data)
    if hashlib.sha256(data[len(digest) :]).digest() != digest:
        return None
    return CompiledKernel(kernel, data[_HEADER.size :], *resources)


def _write(entry: Path, made: CompiledKernel) -> None:
    rest = _HEADER.pack(b"", made.registers, made.spilled_bytes, made.stack_bytes)[32:] + made.cubin
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, prefix=".", delete=False) as file:
            own = Path(file.name)
            try:
                file.write(hashlib.sha256(rest).digest() + rest)
                file.close()
                own.replace(entry)
            except BaseException:
                own.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise BackendError(
            f"Compiled kernels cannot be kept in {entry.parent} ({error.strerror}). Make it writable, or name another "
            "folder in CIERZO_CACHE."
        ) from error
