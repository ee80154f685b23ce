"""Chunks written to rings at every border, for any device; what attention makes of them is not looked at here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from runtime.kernels.cuda.rolling_problem import ACTIVATION_TYPES, HEAD_DIMS, RING_TYPES
from runtime.kernels.cuda.rolling_write import launch_write, rotated_query_bytes
from tests.kernels.cuda.rolling_cases import (
    RollingCase,
    RollingInputs,
    RollingResults,
    check_rings,
    inputs_of,
    rotated_query,
    upload,
)
from tests.support.kernel_devices import Device

FAR = 2**31 + 5


def run_write(device: Device, case: RollingCase, inputs: RollingInputs) -> RollingResults:
    """The rings after it, and as attended the rotated queries."""
    buffers = upload(device, case, inputs, 0)
    assert rotated_query_bytes(case.problem) == buffers.attended.nbytes
    launch_write(device.launcher, case.problem, buffers.tensors, rotated_query=buffers.tensors.attended)
    return buffers.download(device)


def check_write(device: Device, case: RollingCase) -> None:
    """Rings and rotated queries, bit by bit."""
    inputs = inputs_of(case)
    results = run_write(device, case, inputs)
    check_rings(case, inputs, results)
    expected = rotated_query(case, inputs)
    np.testing.assert_array_equal(results.attended_BTHD.astype(np.float32), expected.astype(np.float32))


def chunk(window: int, slots: int, tokens: int, rows: tuple[tuple[int, int], ...], **sizes: object) -> RollingCase:
    """rows: start and count of each."""
    starts, counts = zip(*rows, strict=True)
    return RollingCase(window, slots, starts, counts, tokens, **sizes)  # type: ignore[arg-type]


def borders(slots: int, tokens: int) -> tuple[tuple[int, int], ...]:
    """At the first slot, up to the last, across it, wrapped three times, far on; whole, padded, without a token."""
    starts = (0, slots - tokens, slots - 1, slots, 3 * slots - 2, FAR, 2**40 + 1)
    return (*((start, tokens) for start in starts), (slots - 2, tokens - 1), (5, 1), (7, 0))


def small_cases() -> Iterator[tuple[str, RollingCase]]:
    """For the CPU."""
    for window, slots, tokens in ((6, 10, 5), (4, 16, 2), (1, 7, 7)):
        yield f"{tokens}-tokens-of-{slots}", chunk(window, slots, tokens, borders(slots, tokens))
    yield "full", chunk(0, 20, 5, ((0, 5), (15, 5), (16, 4), (3, 0)))
    rows = ((3, 5), (18, 4))
    yield "packed", chunk(6, 10, 5, rows, packed=True)
    for activations, ring in product(ACTIVATION_TYPES, RING_TYPES):
        sizes = {"activations": activations, "ring": ring}
        yield f"{activations}-with-{ring}", chunk(6, 10, 5, rows, interleaved=True, **sizes)
    yield "several-blocks-of-a-token", chunk(6, 10, 5, rows, head_dim=80, heads=24, kv_heads=3, ring="float8")
    yield "head-dim-256", chunk(6, 10, 5, rows, head_dim=256, heads=3, kv_heads=1)


def large_cases() -> Iterator[tuple[str, RollingCase]]:
    """For a GPU: every head dim and type, both ways of pairing."""
    rows = ((0, 200), (900, 200), (1195, 200), (FAR, 150), (3, 0))
    yield "packed", chunk(1000, 1200, 200, rows, heads=8, head_dim=128, packed=True)
    for head_dim, activations, ring in product(HEAD_DIMS, ACTIVATION_TYPES, RING_TYPES):
        for interleaved in (False, True):
            sizes = {"head_dim": head_dim, "activations": activations, "ring": ring, "interleaved": interleaved}
            name = f"head-dim-{head_dim}-{activations}-with-{ring}-{'interleaved' if interleaved else 'halves'}"
            yield name, chunk(1000, 1200, 200, rows, heads=8, **sizes)
