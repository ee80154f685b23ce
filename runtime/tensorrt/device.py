"""What a session needs of a GPU, and no more: memory, copies, one stream, graphs of what was queued on it.

Everything that is queued runs in order on the stream, later. What the host reads or overwrites must have been waited
for: `Device.synchronize`, or a fence.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.kernels.cuda.launch import Launcher

ALIGNMENT = 256
"""Of every address that is given to a plan or a kernel."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up, so that what follows begins at an aligned address."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class DeviceMemory(Protocol):
    """Memory of the GPU, aligned; free once nobody holds it, or `free` is called."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def free(self) -> None:
        """Give it back, once all that is queued has run."""
        ...


class PinnedMemory(Protocol):
    """Memory of the host that the GPU reads and writes itself; lives as long as any array on it."""

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """uint8 [nbytes]"""
        ...


class Fence(Protocol):
    """A point in the order of what was queued."""

    def wait(self) -> None:
        """Return when all that was queued before it has run. Raises BackendError if any of it failed."""
        ...


class Graph(Protocol):
    """What was queued while a capture ran, to be queued again at once: same kernels, same addresses, same sizes."""

    def launch(self) -> None: ...


class Device(Protocol):
    """One GPU with one stream. Every method raises BackendError where CUDA reports an error."""

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> str:
        """Such as "8.9"."""
        ...

    @property
    def stream(self) -> int:
        """The stream, as plans take it."""
        ...

    @property
    def launcher(self) -> Launcher:
        """Queues our own kernels."""
        ...

    def allocate(self, nbytes: int, what: str) -> DeviceMemory:
        """Memory of undefined content. what: its purpose, for the error that says how much was needed and is free."""
        ...

    def pinned(self, nbytes: int) -> PinnedMemory: ...

    def zero(self, address: int, nbytes: int) -> None:
        """Queue zeros."""
        ...

    def copy_in(self, address: int, source: NDArray[np.uint8]) -> None:
        """Queue a copy of pinned bytes to the GPU; they are read when it runs."""
        ...

    def copy_out(self, target: NDArray[np.uint8], address: int) -> None:
        """Queue a copy from the GPU that fills pinned bytes; they are written when it runs."""
        ...

    def fence(self) -> Fence: ...

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        ...

    def begin_capture(self) -> None:
        """From now on nothing that is queued runs: it is taken down."""
        ...

    def end_capture(self) -> Graph:
        """End the capture, also a failed one, for which this raises BackendError."""
        ...
