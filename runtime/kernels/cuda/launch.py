"""What a launcher asks of whoever runs kernels: a GPU through its driver, or in tests the CPU.

A launcher is a plain function that turns a problem (shapes, device addresses) into launches; it knows nothing of who
runs them. So the same launchers serve TensorRT's plugins, the tests on a GPU, and the tests without one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's name, its source file (beside this one) and what is defined when it is compiled.

    Sizes that the inner loops run over (the head dim, element types, tiles) are definitions; all else is a parameter.
    """

    source: str
    name: str
    definitions: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "definitions", MappingProxyType(dict(sorted(self.definitions.items()))))

    def __hash__(self) -> int:
        return hash((self.source, self.name, tuple(self.definitions.items())))


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What launchers may know of a device.

    multiprocessors: how many blocks of full size run at once. shared_bytes: most dynamic shared memory of a block.
    compute_capability: major and minor version, such as (9, 0).
    """

    multiprocessors: int
    shared_bytes: int
    compute_capability: tuple[int, int]


class Launcher(Protocol):
    """Runs kernels in order, on one stream."""

    @property
    def limits(self) -> DeviceLimits:
        """The device's."""
        ...

    def launch(
        self, kernel: Kernel, *, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        """Queue `kernel` on a grid of blocks of `threads` threads; returns before it has run.

        params: the kernel's one argument, copied before this returns. Raises BackendError when the kernel cannot be
        compiled for the device or launched.
        """
        ...
