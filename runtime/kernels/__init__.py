"""Native kernels of the plugin nodes, for ONNX Runtime on the CPU.

They are C, compiled when the package is installed where there is a compiler, and registered under the names of the
plugin nodes: with the library a node runs its kernel, without it the function body that its file carries.

CIERZO_KERNELS=off runs the bodies, =portable, =neon, =avx2 or =avx512 a level of instructions that the machine has and
that may be lower than its best. CIERZO_KERNEL_LIBRARY names another build of the library, for example one with
sanitizers. Whatever of these cannot be had is refused: a run that asked for it measures or tests something else.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from runtime.errors import BackendError

_HERE = Path(__file__).resolve().parent
_SWITCH, _OTHER = "CIERZO_KERNELS", "CIERZO_KERNEL_LIBRARY"
OFF = "off"
LEVELS = ("portable", "neon", "avx2", "avx512")
"""Levels of instructions: runtime/kernels/cpu/isa.h."""


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
    """The library that was built with this package, or the one that the environment names; None without one.

    Raises BackendError where the environment asks for a level that does not exist or for a file that is not there.
    """
    if _switch() == OFF:
        return None
    if named := os.environ.get(_OTHER):
        path = Path(named).absolute()  # the loader would look for a bare name in the system's folders
        if not path.is_file():
            raise BackendError(f"{_OTHER} names {path}, which is not a file; {_INSTEAD}.")
        return path
    # This interpreter's own first: an earlier one's build may lie beside it, of older sources.
    built = (_HERE / f"_cpu{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in built if path.is_file()), None)


def kernels() -> Kernels | None:
    """The kernels that sessions of this process use, or None: then every node's function body runs.

    Raises BackendError as library_path does, for a library of the environment that cannot be loaded, and for a level
    that this machine does not have.
    """
    path = library_path()
    if path is None:
        return None
    library = _opened(path)
    if library is None:
        if os.environ.get(_OTHER):
            raise BackendError(
                f"{_OTHER} names {path}, which is not a library of Cierzo's kernels or not one for this machine; "
                f"{_INSTEAD}."
            )
        return None
    isa, wanted = _text(library.cierzo_isa()), _switch()
    if wanted not in (None, isa):
        raise BackendError(
            f"{_SWITCH}={wanted} asks for a level of instructions that this machine does not have, or was set when "
            f"this process had chosen its level already: its kernels run with {isa}. Unset {_SWITCH}, or set a level "
            "of this machine before Python starts."
        )
    return Kernels(path, isa, tuple(dict.fromkeys(_ops(library))))


def why_none() -> str | None:
    """Why no kernels are in use, a sentence for a person; None when they are. Raises BackendError as kernels does."""
    if kernels() is not None:
        return None
    if _switch() == OFF:
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


_INSTEAD = f"name a file that is one, or unset {_OTHER} for the library that was built with Cierzo"


def _switch() -> str | None:
    """What the environment asks for: OFF, one of LEVELS, or nothing."""
    wanted = os.environ.get(_SWITCH) or None
    if wanted not in (None, OFF, *LEVELS):
        raise BackendError(
            f"{_SWITCH}={wanted} is unknown: set it to {OFF} for the nodes' portable bodies, to a level of "
            f"instructions ({', '.join(LEVELS)}) that this machine has, or unset it for the machine's best."
        )
    return wanted


def _ops(library: ctypes.CDLL) -> Iterator[str]:
    index = 0
    while (name := library.cierzo_op(index)) is not None:
        yield _text(name)
        index += 1


@cache
def _opened(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
        library.cierzo_isa.restype = ctypes.c_char_p
        library.cierzo_op.restype = ctypes.c_char_p
        library.cierzo_op.argtypes = [ctypes.c_int]
        library.cierzo_counter.restype = ctypes.c_char_p
        library.cierzo_counter.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    except (OSError, AttributeError):  # no library, or another one
        return None
    return library


def _text(raw: bytes) -> str:
    return raw.decode()
