"""Where a case of a kernel's test runs: the CPU, or a GPU. Cases are written once against `Device`.

Buffers are poisoned and guarded: before and after each lie bytes that no kernel may change, checked at every download.
On the CPU, memory that may not be touched at all follows the last of them, so that reading too far faults as well.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.kernels.cuda.device_launcher import DeviceLauncher, checked, load_driver
from runtime.kernels.cuda.launch import DeviceLimits, Launcher
from tests.support.cuda_cpu import LIMITS, CpuLauncher

Array = npt.NDArray[Any]
GUARD_BYTES = 4096
CANARY = 0x7F
"""In every byte around a buffer: huge or NaN in every type, so that a number made of it shows."""
POISON = 0xFF
"""In every byte of what is not written yet: NaN in every floating-point type, -1 in integers."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of a device. address: its first byte, aligned to 256."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    allocation: Any
    """What keeps the memory; the device's own."""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Device(Protocol):
    """A place to run kernels, and its memory."""

    @property
    def launcher(self) -> Launcher: ...

    def upload(self, array: Array) -> Buffer:
        """A copy of the array on the device."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        """Poisoned memory."""
        ...

    def download(self, buffer: Buffer) -> Array:
        """What the buffer holds once all launches have run. Fails if a kernel wrote around it."""
        ...


def _framed(content: bytes) -> Array:
    """The content between two guards, the second one reaching up to a multiple of 256 bytes."""
    tail = GUARD_BYTES + -len(content) % 256
    frame = np.full(GUARD_BYTES + len(content) + tail, CANARY, np.uint8)
    frame[GUARD_BYTES : GUARD_BYTES + len(content)] = np.frombuffer(content, np.uint8)
    return frame


def _content(frame: Array, buffer: Buffer) -> Array:
    end = GUARD_BYTES + buffer.nbytes
    before, after = np.flatnonzero(frame[:GUARD_BYTES] != CANARY), np.flatnonzero(frame[end:] != CANARY)
    assert not before.size, f"a kernel wrote {GUARD_BYTES - before[-1]} bytes before a buffer of {buffer.nbytes}"
    assert not after.size, f"a kernel wrote byte {buffer.nbytes + after[0]} of a buffer of {buffer.nbytes}"
    return frame[GUARD_BYTES:end].copy().view(buffer.dtype).reshape(buffer.shape)


class CpuDevice:
    """The CPU. seed: the order of threads and blocks (see CpuLauncher)."""

    def __init__(self, limits: DeviceLimits = LIMITS, *, seed: int | None = None) -> None:
        self._launcher = CpuLauncher(limits, seed=seed)

    @property
    def launcher(self) -> Launcher:
        return self._launcher

    def upload(self, array: Array) -> Buffer:
        return self._buffer(array.tobytes(), array.shape, array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._buffer(bytes([POISON]) * count, shape, np.dtype(dtype))

    def download(self, buffer: Buffer) -> Array:
        return _content(buffer.allocation, buffer)

    @staticmethod
    def _buffer(content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        frame = _framed(content)[: GUARD_BYTES + -(-len(content) // 256) * 256]
        room = -(-frame.size // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), np.uint8)
        closed = ctypes.c_void_p(pages.ctypes.data + room), ctypes.c_size_t(mmap.PAGESIZE)
        if ctypes.CDLL(None, use_errno=True).mprotect(*closed, 0):
            raise OSError(ctypes.get_errno(), "memory cannot be closed to reading")
        memory = pages[room - frame.size : room]
        memory[:] = frame
        return Buffer(memory.ctypes.data + GUARD_BYTES, shape, dtype, memory)


class GpuDevice:
    """A GPU of this machine, in its primary context, on a stream of its own.

    Raises BackendError if there is none.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._driver = load_driver()
        self._call("start", self._driver.cuInit(0))
        device = self._call("be opened", self._driver.cuDeviceGet(ordinal))
        self._call(
            "be used", self._driver.cuCtxSetCurrent(self._call("open", self._driver.cuDevicePrimaryCtxRetain(device)))
        )
        # One that waits for the default stream and is waited for by it: copies to and from the host use that one.
        self.stream = int(self._call("make a stream", self._driver.cuStreamCreate(0)))
        self._launcher = DeviceLauncher(self.stream, driver=self._driver)

    @property
    def launcher(self) -> DeviceLauncher:
        return self._launcher

    def upload(self, array: Array) -> Buffer:
        return self._buffer(array.tobytes(), array.shape, array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._buffer(bytes([POISON]) * count, shape, np.dtype(dtype))

    def download(self, buffer: Buffer) -> Array:
        self.synchronize()
        frame = np.empty(buffer.allocation.nbytes, np.uint8)
        copied = self._driver.cuMemcpyDtoH(frame.ctypes.data, buffer.allocation.address, frame.nbytes)
        self._call("copy to the host", copied)
        return _content(frame, buffer)

    def synchronize(self) -> None:
        """Waits for all launches."""
        self._call("finish what was launched", self._driver.cuStreamSynchronize(self.stream))

    def _buffer(self, content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        frame = _framed(content)
        address = int(self._call("allocate", self._driver.cuMemAlloc(frame.nbytes)))
        allocation = _GpuMemory(self._driver, address, frame.nbytes)
        self._call("copy from the host", self._driver.cuMemcpyHtoD(address, frame.ctypes.data, frame.nbytes))
        return Buffer(address + GUARD_BYTES, shape, dtype, allocation)

    def _call(self, what: str, answer: tuple[Any, ...]) -> Any:
        return checked(self._driver, what, answer)


@dataclass(frozen=True)
class _GpuMemory:
    """Freed with the last buffer that holds it; the driver waits for launches that use it."""

    driver: Any
    address: int
    nbytes: int

    def __del__(self) -> None:
        self.driver.cuMemFree(self.address)
