"""Every kernel of the tree compiles for every architecture, and its numbers fit into registers."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

from runtime.kernels.cuda.catalogue import TYPICAL_LIMITS, representative_kernels
from runtime.kernels.cuda.compiler import SOURCES, SUPPORTED_ARCHITECTURES, architecture, compile_kernel

CACHE = Path(tempfile.gettempdir()) / f"cierzo-cubins-{os.getuid()}"
"""Kept between runs: compiling them all takes a minute and a half."""
MOST_SPILLED = {"rolling_prefill": 32}
"""Bytes that a thread stores to and loads from local memory, counted where they stand in the code; 0 for all others.
Prefill's sums and tiles take all 255 registers that a thread can have, and the compiler puts a few addresses aside."""


def test_the_catalogue_holds_every_kernel_for_every_architecture() -> None:
    written = {
        (path.name, name)
        for path in SOURCES.glob("*.cu")
        for name in re.findall(r"^CIERZO_KERNEL\((\w+),", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert written
    assert tuple(TYPICAL_LIMITS) == SUPPORTED_ARCHITECTURES
    for capability, limits in TYPICAL_LIMITS.items():
        assert limits.compute_capability == capability
        assert {(kernel.source, kernel.name) for kernel in representative_kernels(capability)} == written


@pytest.mark.parametrize("capability", SUPPORTED_ARCHITECTURES, ids=architecture)
def test_every_kernel_compiles_and_keeps_to_its_registers(capability: tuple[int, int]) -> None:
    for kernel in representative_kernels(capability):
        made = compile_kernel(kernel, capability, cache=CACHE)
        assert made.cubin.startswith(b"\x7fELF")
        assert made.spilled_bytes <= MOST_SPILLED.get(kernel.name, 0), f"{kernel} spills {made.spilled_bytes} bytes"
