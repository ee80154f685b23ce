"""A place for engines of graphs on the host: ONNX Runtime's CPU provider, and memory that shows what is done to it."""

from __future__ import annotations

import weakref

import numpy as np

from runtime.errors import BackendError
from runtime.onnxruntime_cuda.place import ALIGNMENT, Block, Bytes, Place

_POISON = 0xFF
"""Bytes of memory that nobody has written yet: NaN as any kind of float, −1 as an integer."""


class HostBlock:
    """See runtime.onnxruntime_cuda.place.Block."""

    def __init__(self, memory: HostMemory, nbytes: int, what: str) -> None:
        raw = np.full(nbytes + ALIGNMENT, _POISON, np.uint8)
        begin = -raw.ctypes.data % ALIGNMENT
        self.bytes = raw[begin : begin + nbytes]
        self.address, self.nbytes, self.what = int(raw.ctypes.data) + begin, nbytes, what
        # What is given back is poisoned and kept, so that whoever still uses it is found out.
        memory.graves.append(raw)
        self._given_back = weakref.finalize(self, memory.give_back, raw, nbytes)

    def free(self) -> None:
        self._given_back()


class HostMemory:
    """See Memory. limit: bytes that may be held at once. held: bytes that are. writes, reads: bytes of each copy."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.held = limit, 0
        self.asked: list[tuple[str, int]] = []
        self.writes: list[int] = []
        self.reads: list[int] = []
        self.zeroed: list[int] = []
        self.graves: list[Bytes] = []

    def allocate(self, nbytes: int, what: str) -> HostBlock:
        self.asked.append((what, nbytes))
        if self.limit is not None and self.held + nbytes > self.limit:
            raise BackendError(f"The double's memory does not suffice for {what}.")
        self.held += nbytes
        return HostBlock(self, nbytes, what)

    def give_back(self, raw: Bytes, nbytes: int) -> None:
        raw[:] = _POISON
        self.held -= nbytes

    def staging(self, nbytes: int) -> Bytes:
        return np.full(nbytes, _POISON, np.uint8)

    def zero(self, block: Block) -> None:
        assert isinstance(block, HostBlock)
        block.bytes[:] = 0
        self.zeroed.append(block.nbytes)

    def write(self, address: int, source: Bytes) -> None:
        self.writes.append(source.nbytes)
        _at(address, source.nbytes)[:] = source

    def read(self, target: Bytes, address: int) -> None:
        self.reads.append(target.nbytes)
        target[:] = _at(address, target.nbytes)


def host_place(memory: HostMemory | None = None) -> Place:
    """The CPU provider."""
    return Place("cpu", "CPUExecutionProvider", "the host", HostMemory() if memory is None else memory, reads_host=True)


def _at(address: int, nbytes: int) -> Bytes:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
