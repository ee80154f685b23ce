"""Steps of one token a row at every border of window, ring, tile and share, for any device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from runtime.kernels.cuda.rolling_decode import decode_workspace_bytes, launch_decode
from runtime.kernels.cuda.rolling_problem import ACTIVATION_TYPES, HEAD_DIMS, RING_TYPES
from tests.kernels.cuda.rolling_cases import RollingCase, check
from tests.support.kernel_devices import Device

IDLE = 0
FAR = 2**31 + 5


def check_decode(device: Device, case: RollingCase) -> None:
    check(device, case, launch_decode, decode_workspace_bytes)


def step(window: int, slots: int, starts: tuple[int, ...], **sizes: object) -> RollingCase:
    """A step of rows of one token each; a start of -1 stands for a row without one."""
    counts = tuple(int(start >= 0) for start in starts)
    return RollingCase(window, slots, tuple(max(start, IDLE) for start in starts), counts, **sizes)  # type: ignore[arg-type]


def borders(window: int, slots: int) -> tuple[int, ...]:
    """Where the newest token may be: first, around a full window, twice beyond it, ring wrapped three times, far on."""
    near = (0, window - 2, window - 1, window, 2 * window)
    return (*near, -1, slots - 1, slots, 3 * slots + window // 2, FAR, 2**40 + 1)


def small_cases() -> Iterator[tuple[str, RollingCase]]:
    """For the CPU: tiny, and few different kernels, since each is compiled."""
    for window, slots in ((100, 100), (130, 137), (64, 64), (5, 9), (1, 1)):
        yield f"window-{window}-of-{slots}", step(window, slots, borders(window, slots))
    yield "full", step(0, 200, (0, 1, 63, 64, 127, 198, 199, -1))
    yield "more-steps-than-stages", step(900, 901, (500, 899, 2000))
    for activations, ring in product(ACTIVATION_TYPES, RING_TYPES):
        case = step(70, 75, (20, -1, 190, FAR), activations=activations, ring=ring, interleaved=True)
        yield f"{activations}-with-{ring}", case
    for group in (1, 4, 6, 8):
        yield f"group-{group}", step(70, 75, (20, 190), heads=2 * group)
    for heads in (12, 19):  # 19: two blocks of ten and nine
        yield f"one-kv-head-for-{heads}", step(70, 75, (20, 190), heads=heads, kv_heads=1)
    yield "head-dim-80", step(70, 75, (20, 190), head_dim=80, ring="float8", kv_heads=1, heads=2)
    yield "head-dim-128", step(70, 75, (20, 190), head_dim=128, kv_heads=1)
    yield "head-dim-256", step(40, 40, (20, 190), head_dim=256, kv_heads=1, heads=2)
    yield "peaks", step(150, 150, (140, 500), magnitude=6.0)
    yield "packed", step(70, 75, (20, -1, 190, FAR), packed=True)


def large_cases() -> Iterator[tuple[str, RollingCase]]:
    """For a GPU: every head dim, type and group at sizes where a row has many shares, and Mistral's own."""
    starts = (0, 700, -1, 1023, 1024, 5000, FAR)
    for head_dim, ring, activations in product(HEAD_DIMS, RING_TYPES, ACTIVATION_TYPES):
        sizes = {"head_dim": head_dim, "ring": ring, "activations": activations}
        yield f"head-dim-{head_dim}-{activations}-with-{ring}", step(1024, 1100, starts, **sizes)
    for group, ring in product((1, 2, 3, 4, 6, 8, 12, 16, 19), RING_TYPES):
        yield f"group-{group}-with-{ring}", step(1000, 1000, starts, heads=2 * group, ring=ring, head_dim=128)
    for batch in (1, 8, 32):
        rows = tuple(4000 + 97 * row for row in range(batch))
        yield f"mistral-{batch}", step(4096, 4096, rows, heads=32, kv_heads=8, head_dim=128)
    yield "full", step(0, 9000, (0, 63, 64, 4095, 8999, -1), heads=32, kv_heads=8, head_dim=128)
    yield "interleaved", step(1000, 1003, starts, head_dim=128, interleaved=True)
    yield "peaks", step(1000, 1003, starts, head_dim=128, magnitude=6.0)
    yield "packed", step(1000, 1003, starts, head_dim=128, packed=True)
