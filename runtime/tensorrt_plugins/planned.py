"""The device that an engine is planned for, before any such device is seen."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher

_KIB = 1024
LARGEST: Mapping[str, DeviceLimits] = {
    "8.0": DeviceLimits(128, 163 * _KIB, (8, 0)),
    "8.6": DeviceLimits(84, 99 * _KIB, (8, 6)),
    "8.9": DeviceLimits(144, 99 * _KIB, (8, 9)),
    "9.0": DeviceLimits(144, 227 * _KIB, (9, 0)),
    "12.0": DeviceLimits(192, 99 * _KIB, (12, 0)),
}
"""By compute capability: the multiprocessors of the whole chip, of which products have fewer, from NVIDIA's white
papers; and the most shared memory of a block, from the CUDA C++ Programming Guide's table of compute capabilities."""


def planned_device(compute_capability: str) -> DeviceLimits:
    """The largest device of that compute capability, such as "8.9". Raises BackendError where no kernels are."""
    if compute_capability not in LARGEST:
        raise BackendError(
            f"The plugins' CUDA kernels are made for compute capability {', '.join(LARGEST)}, not for "
            f"{compute_capability}. Build without plugins (--plugins none) for this GPU."
        )
    return LARGEST[compute_capability]


@dataclass(frozen=True, slots=True)
class PlannedLauncher:
    """Launches on `launcher`, but lets the work be divided as for the device that was planned."""

    launcher: Launcher
    limits: DeviceLimits

    def launch(
        self, kernel: Kernel, *, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        """See Launcher."""
        self.launcher.launch(kernel, grid=grid, threads=threads, shared_bytes=shared_bytes, params=params)
