"""Arrays in memory that ends where their last number ends: what reads on behind it ends the process.

A sanitizer does not see vector instructions that leave lanes out, and reading past a tensor in a heap goes unnoticed.
Weights are mapped from files, where the page after the last one may not exist.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(array: npt.NDArray[Any], *, shift: int = 0) -> npt.NDArray[Any]:
    """A copy in C order whose last byte is `shift` bytes before a page that cannot be read.

    With a shift that is no multiple of the items' size the numbers lie across their natural places.
    """
    if array.nbytes == 0:
        return np.array(array, order="C")
    pages = -(-(array.nbytes + shift) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint8)
    forbidden = ctypes.c_void_p(whole.ctypes.data + pages * mmap.PAGESIZE)
    if _libc.mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    begin = pages * mmap.PAGESIZE - array.nbytes - shift
    copy = whole[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
