"""What this machine's arithmetic units can do at most, measured by the native library's own loops."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from runtime.kernels import library_path


def int8_operations(rounds: int) -> int | None:
    """Does nothing but multiply and add 8-bit numbers in registers; returns how many operations these were.

    A product and its addition count two. Python's lock is not held meanwhile, so threads run side by side.
    None where there is no library, or one at a level that has no instructions for such sums.
    """
    path = library_path()
    library = None if path is None else _opened(path)
    return None if library is None else int(library.cierzo_int8_operations(rounds)) or None


@cache
def _opened(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
        library.cierzo_int8_operations.restype = ctypes.c_uint64
        library.cierzo_int8_operations.argtypes = [ctypes.c_uint64]
    except (OSError, AttributeError):  # the other build that the environment named may be older
        return None
    return library
