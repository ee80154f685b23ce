"""What the stand-in writes down: see journal.h."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

JOURNAL = "CIERZO_CUDA_JOURNAL"
"""Environment variable that names the journal's file."""
CAPABILITY = "CIERZO_CUDA_CAPABILITY"
"""Environment variable that names the device: one of CAPABILITIES, or NO_DEVICE."""
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "12.0")
NO_DEVICE = "none"
ARGUMENTS = "CIERZO_CUDA_ARGUMENTS"
"""Environment variable: a part of the names of kernels whose first argument is to be written down."""
MARK = "mark"
"""Kind of the lines that the test's own process adds between the stand-in's."""


@dataclass(frozen=True, slots=True)
class Event:
    """One call. kind and what:

    "launch": the kernel's name with its template arguments. "copy": "HtoD", "DtoH", "DtoD" or "HtoH", with " pageable"
    behind it where the host's memory is not pinned. "fill", "allocate", "free", "sync", "blas": the call's name.
    "capture": "begin", "end" or "spoilt". "graph": "launch". "entry": a function of the driver that was looked up.
    "argument": the first bytes of the first argument of the kernel launched before, as hexadecimal digits.
    "violation": what a GPU refuses, or what would go wrong on one.

    bytes: copied, filled or allocated; of a launch, the dynamic shared memory. grid, block: of a launch; the grid of a
    product is its m, n and k as cuBLAS counts them (columns first). captured: whether a capture was on.
    """

    kind: str
    what: str
    bytes: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    captured: bool


def read_journal(path: Path) -> tuple[Event, ...]:
    """The events in their order; none where the stand-in was never called."""
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return tuple(_event(line) for line in lines)


def _event(line: str) -> Event:
    kind, what, count, grid, block, captured = line.split("\t")
    return Event(kind, what, int(count), _dims(grid), _dims(block), captured == "1")


def _dims(text: str) -> tuple[int, int, int]:
    x, y, z = (int(dim) for dim in text.split(","))
    return x, y, z
