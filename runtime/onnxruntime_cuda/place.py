"""Where an engine runs: one of ONNX Runtime's providers, and the memory of its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

ALIGNMENT = 256
"""Of every address that is bound."""


MOST_NUMBERS = (1 << 31) - 1
"""Of one array: ONNX Runtime's kernels count them in 32 bits."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up, so that what follows begins at an aligned address."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Block(Protocol):
    """A piece of the device's memory, aligned; given back once nobody holds it, or `free` is called."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def free(self) -> None:
        """Give it back. Nothing may run any more that reads or writes it."""
        ...


class Memory(Protocol):
    """The device's memory. Calls return when what they do is done, and raise BackendError where the device fails."""

    def allocate(self, nbytes: int, what: str) -> Block:
        """Memory of undefined content. what: its purpose, for the error that says how much was needed and is free."""
        ...

    def staging(self, nbytes: int) -> Bytes:
        """uint8 [nbytes] of the host, which the device copies from and to at full speed."""
        ...

    def zero(self, block: Block) -> None: ...

    def write(self, address: int, source: Bytes) -> None:
        """Copy bytes of the host, contiguous, to the device."""
        ...

    def read(self, target: Bytes, address: int) -> None:
        """Fill bytes of the host, contiguous, from the device."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """device_type: as bindings call it, "cuda" or "cpu". provider: its name in ONNX Runtime. name: for a person.

    options: of the provider, for every session. capturing: more of them, for a session whose steps are captured and
    launched as one. entries: of the session's configuration. reads_host: whether it computes with memory of the host,
    so that initializers are used where they lie and not copied.
    """

    device_type: str
    provider: str
    name: str
    memory: Memory
    options: Mapping[str, str] = field(default_factory=dict)
    capturing: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    reads_host: bool = False
