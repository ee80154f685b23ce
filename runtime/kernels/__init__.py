"""Native kernels of the plugin nodes, for ONNX Runtime on the CPU.

They are C, compiled when the package is installed where there is a compiler, and registered under the names of the
plugin nodes: with the library a node runs its kernel, without it the function body that its file carries.

CIERZO_KERNELS=off runs the bodies, =portable, =neon or =avx2 a lower level of instructions than the machine has.
CIERZO_KERNEL_LIBRARY names another build of the library, for example one with sanitizers.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_SWITCH, _OTHER = "CIERZO_KERNELS", "CIERZO_KERNEL_LIBRARY"
OFF = "off"


@dataclass(frozen=True, slots=True)
class Kernels:
    """The library in use. isa: its level of instructions. ops: the plugin nodes that it runs."""

    library: Path
    isa: str
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counter:
    """What one op has done in this process. bytes: of weights or of KV buffers that its calls had to read."""

    op: str
    calls: int
    seconds: float
    bytes: int


def library_path() -> Path | None:
    """The library that was built with this package, or the one that the environment names; None without one."""
    if os.environ.get(_SWITCH) == OFF:
        return None
    if named := os.environ.get(_OTHER):
        return Path(named)
    return next(iter(sorted(_HERE.glob("_cpu*.so"))), None)


def kernels() -> Kernels | None:
    """The kernels that sessions of this process use, or None: then every node's function body runs."""
    path = library_path()
    if path is None:
        return None
    library = _opened(path)
    if library is None:
        return None
    return Kernels(path, _text(library.cierzo_isa()), tuple(dict.fromkeys(_ops(library))))


def why_none() -> str | None:
    """Why no kernels are in use, a sentence for a person; None when they are."""
    if kernels() is not None:
        return None
    if os.environ.get(_SWITCH) == OFF:
        return f"{_SWITCH}={OFF} switches the native kernels off; the nodes' portable bodies run."
    if library_path() is None:
        return (
            "The native kernels were not built, since no C compiler was found when Cierzo was installed; the nodes' "
            "portable bodies run, which are slower. Install a compiler (Debian, Ubuntu: apt-get install gcc) and "
            "install Cierzo again."
        )
    return f"The native kernels in {library_path()} cannot be loaded on this machine; the nodes' portable bodies run."


def counters() -> tuple[Counter, ...]:
    """What each op's kernel has done so far in this process."""
    path = library_path()
    library = None if path is None else _opened(path)
    if library is None:
        return ()
    found = []
    values = (ctypes.c_uint64 * 3)()
    index = 0
    while (name := library.cierzo_counter(index, values)) is not None:
        found.append(Counter(_text(name), int(values[0]), values[1] * 1e-9, int(values[2])))
        index += 1
    return tuple(found)


def _ops(library: ctypes.CDLL) -> Iterator[str]:
    index = 0
    while (name := library.cierzo_op(index)) is not None:
        yield _text(name)
        index += 1


@cache
def _opened(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    library.cierzo_isa.restype = ctypes.c_char_p
    library.cierzo_op.restype = ctypes.c_char_p
    library.cierzo_op.argtypes = [ctypes.c_int]
    library.cierzo_counter.restype = ctypes.c_char_p
    library.cierzo_counter.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    return library


def _text(raw: bytes) -> str:
    return raw.decode()
