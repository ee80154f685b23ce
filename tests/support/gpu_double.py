"""A GPU that is none: `runtime.tensorrt.device.Device` on memory of the host, stricter than a real one.

What is queued runs as late as it may: when somebody waits for it. So a session that overwrites what a copy has yet to
read, or reads what a copy has yet to write, gets wrong numbers here every time and not once a day. Memory is poisoned
when it is given out and when it is taken back, and nothing may touch it after that.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel
from runtime.tensorrt.device import ALIGNMENT, aligned
from tests.support.cuda_cpu import CpuLauncher

POISON = 0xFF
"""NaN in every floating-point type, -1 in integers."""

Bytes = NDArray[np.uint8]


class GpuFault(AssertionError):
    """Something that a GPU would not survive, or that would give other numbers from run to run."""


@dataclass(slots=True)
class Operation:
    """Something queued. run: does it. queued: what happens at once, each time that it is queued."""

    run: Callable[[], None]
    queued: Callable[[], None] | None = None


class Region:
    """Memory that was given out once. Its addresses are never given out again."""

    def __init__(self, nbytes: int) -> None:
        memory = np.full(aligned(nbytes) + ALIGNMENT, POISON, np.uint8)
        skip = -memory.ctypes.data % ALIGNMENT
        self.bytes: Bytes = memory[skip : skip + nbytes]
        self.address, self.alive = self.bytes.ctypes.data, True


class HostMemory:
    """See DeviceMemory."""

    def __init__(self, device: HostDevice, region: Region) -> None:
        self.address, self.nbytes = region.address, region.bytes.nbytes
        self._free = weakref.finalize(self, device.take_back, region)

    def free(self) -> None:
        self._free()


@dataclass(slots=True)
class HostPinned:
    """See PinnedMemory."""

    bytes: Bytes


class HostFence:
    """See Fence."""

    def __init__(self, device: HostDevice) -> None:
        self._device, self._passed = device, False
        device.submit(Operation(self._pass))

    def _pass(self) -> None:
        self._passed = True

    def wait(self) -> None:
        while not self._passed:
            self._device.run_one()


@dataclass(slots=True)
class HostGraph:
    """See Graph."""

    device: HostDevice
    operations: list[Operation]

    def launch(self) -> None:
        self.device.log.append("graph")
        for operation in self.operations:
            self.device.submit(operation)


class DeferringLauncher:
    """Queues kernels, which then run on the CPU."""

    def __init__(self, device: HostDevice) -> None:
        self._device, self._launcher = device, CpuLauncher()

    @property
    def limits(self) -> DeviceLimits:
        return self._launcher.limits

    def launch(
        self, kernel: Kernel, *, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        copy = type(params).from_buffer_copy(params)
        self._device.log.append(kernel.name)
        self._device.submit(
            Operation(
                lambda: self._launcher.launch(
                    kernel, grid=grid, threads=threads, shared_bytes=shared_bytes, params=copy
                )
            )
        )


@dataclass(slots=True, eq=False)
class HostDevice:
    """See Device. capacity: bytes that it has. capturable: whether captures succeed.

    log: one word for each thing queued that a test may want to count.
    """

    capacity: int = 1 << 40
    capturable: bool = True
    name: str = "a double"
    compute_capability: str = "8.9"
    stream: int = 7
    log: list[str] = field(default_factory=list)
    _regions: list[Region] = field(default_factory=list)
    _fault: str | None = None
    _pinned: list[HostPinned] = field(default_factory=list)
    _queue: list[Operation] = field(default_factory=list)
    _captured: list[Operation] | None = None
    _launcher: DeferringLauncher | None = None

    @property
    def launcher(self) -> DeferringLauncher:
        if self._launcher is None:
            self._launcher = DeferringLauncher(self)
        return self._launcher

    @property
    def capturing(self) -> bool:
        return self._captured is not None

    @property
    def held(self) -> int:
        """Bytes that are given out."""
        return sum(region.bytes.nbytes for region in self._regions if region.alive)

    def allocate(self, nbytes: int, what: str) -> HostMemory:
        if self.capturing:
            raise GpuFault(f"memory for {what} was asked for while a graph was captured")
        if self.held + nbytes > self.capacity:
            raise BackendError(f"too little memory for {what}")
        self._regions.append(Region(max(nbytes, 1)))
        return HostMemory(self, self._regions[-1])

    def take_back(self, region: Region) -> None:
        """What `HostMemory.free` does: as CUDA's, it waits for what is queued. May be called by a destructor."""
        if self.capturing:
            self._fault = "memory was freed while a graph was captured"
            return
        self.synchronize()
        region.alive = False
        region.bytes[:] = POISON

    def pinned(self, nbytes: int) -> HostPinned:
        self._pinned.append(HostPinned(np.full(max(nbytes, 1), POISON, np.uint8)))
        return self._pinned[-1]

    def view(self, address: int, nbytes: int) -> Bytes:
        """Memory of the device, which must be given out."""
        for region in self._regions:
            if region.address <= address and address + nbytes <= region.address + region.bytes.nbytes:
                if not region.alive:
                    raise GpuFault("memory was used after it was freed")
                begin = address - region.address
                return region.bytes[begin : begin + nbytes]
        raise GpuFault(f"{nbytes} bytes at {address:#x} are none of the device's")

    def zero(self, address: int, nbytes: int) -> None:
        self.submit(Operation(lambda: self.view(address, nbytes).fill(0)))

    def copy_in(self, address: int, source: Bytes) -> None:
        self._check_pinned(source)
        self.submit(Operation(lambda: np.copyto(self.view(address, source.nbytes), source)))

    def copy_out(self, target: Bytes, address: int) -> None:
        self._check_pinned(target)
        self.submit(
            Operation(lambda: np.copyto(target, self.view(address, target.nbytes)), queued=lambda: target.fill(POISON))
        )

    def fence(self) -> HostFence:
        return HostFence(self)

    def submit(self, operation: Operation) -> None:
        """Queue an operation, or take it down."""
        if self._fault is not None:
            raise GpuFault(self._fault)
        if self._captured is not None:
            self._captured.append(operation)
            return
        if operation.queued is not None:
            operation.queued()
        self._queue.append(operation)

    def run_one(self) -> None:
        """Run the oldest operation."""
        if self.capturing:
            raise GpuFault("somebody waited while a graph was captured")
        if not self._queue:
            raise GpuFault("somebody waits for what was never queued")
        self._queue.pop(0).run()

    def synchronize(self) -> None:
        if self.capturing:
            raise GpuFault("somebody waited while a graph was captured")
        while self._queue:
            self.run_one()

    def begin_capture(self) -> None:
        self.log.append("capture")
        self._captured = []

    def end_capture(self) -> HostGraph:
        captured, self._captured = self._captured, None
        if captured is None:
            raise GpuFault("no capture had begun")
        if not self.capturable:
            raise BackendError("this stream cannot be captured.")
        return HostGraph(self, captured)

    def _check_pinned(self, array: Bytes) -> None:
        begin, end = array.ctypes.data, array.ctypes.data + array.nbytes
        for pinned in self._pinned:
            if pinned.bytes.ctypes.data <= begin and end <= pinned.bytes.ctypes.data + pinned.bytes.nbytes:
                return
        raise GpuFault("a copy was queued for memory of the host that is not pinned")
