"""Rolling attention over chunks, by the CUDA sources on the CPU."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import numpy as np
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits
from runtime.kernels.cuda.rolling_prefill import (
    PrefillTiling,
    launch_rolling_prefill,
    prefill_tiling,
    rolling_prefill_kernels,
)
from runtime.kernels.cuda.rolling_problem import ACTIVATION_TYPES, HEAD_DIMS, RING_TYPES, RollingTensors
from tests.kernels.cuda import rolling_cases, rolling_prefill_cases
from tests.kernels.cuda.rolling_cases import TYPES, RollingCase
from tests.kernels.cuda.rolling_prefill_cases import SMALL
from tests.support.cuda_cpu import KernelFault
from tests.support.kernel_devices import CpuDevice

WINDOWS, ROWS = rolling_prefill_cases.window_cases(), rolling_prefill_cases.row_cases()
HEADS, TYPED, SIZES = (
    rolling_prefill_cases.head_cases(),
    rolling_prefill_cases.type_cases(),
    rolling_prefill_cases.size_cases(),
)
ODD = PrefillTiling(warps=1, row_blocks=2, keys=48)
SHARED_BYTES = (99 << 10, 163 << 10, 227 << 10)


@pytest.mark.parametrize("name", [*WINDOWS, *ROWS, *HEADS])
def test_is_rolling_attention(name: str) -> None:
    rolling_prefill_cases.check(CpuDevice(), (WINDOWS | ROWS | HEADS)[name])


@pytest.mark.parametrize("name", TYPED)
def test_types(name: str) -> None:
    rolling_prefill_cases.check_attention(CpuDevice(), TYPED[name])


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_devices(name: str) -> None:
    case, limits = SIZES[name]
    rolling_prefill_cases.check_attention(CpuDevice(limits), case, None)


def test_tiles_that_are_no_power_of_two() -> None:
    rolling_prefill_cases.check_attention(CpuDevice(), WINDOWS["window-50-tokens-55"], ODD)


def test_large_scores() -> None:
    """All weights but a few underflow, and the highest score so far is passed again and again."""
    rolling_prefill_cases.check(CpuDevice(), replace(WINDOWS["window-50-tokens-33"], magnitude=6.0))


def test_faults_are_seen_where_they_are() -> None:
    rolling_prefill_cases.check_faults_are_seen_where_they_are(CpuDevice())


def test_faults_are_seen_where_they_are_in_large_tiles() -> None:
    rolling_prefill_cases.check_faults_are_seen_where_they_are(CpuDevice(), ODD)


def test_query_faults_stay() -> None:
    rolling_prefill_cases.check_query_faults_stay(CpuDevice())


@pytest.mark.parametrize("tiling", [SMALL, None], ids=["small", "of-the-device"])
def test_bits_do_not_depend_on_chunks(tiling: PrefillTiling | None) -> None:
    rolling_prefill_cases.check_chunks_do_not_matter(CpuDevice(), tiling)


def test_bits_do_not_depend_on_other_rows() -> None:
    rolling_prefill_cases.check_rows_do_not_matter(CpuDevice())


def test_bits_do_not_depend_on_the_order_of_threads() -> None:
    case = WINDOWS["window-16-tokens-21"]
    inputs = rolling_cases.inputs_of(case)
    first, *others = (rolling_prefill_cases.run(CpuDevice(seed=seed), case, inputs) for seed in range(4))
    for other in others:
        rolling_prefill_cases.same_bits(other.attended_BTHD, first.attended_BTHD)


class _Guarded:
    """Rings of one KV head, whose slots outside [begin, end) lie on pages that may not be touched."""

    def __init__(self, rows_SD: np.ndarray, begin: int, end: int) -> None:
        self.memory = mmap.mmap(-1, rows_SD.nbytes)
        self.memory.write(rows_SD.tobytes())
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        row = rows_SD[0].nbytes
        self._close(0, begin * row)
        self._close(end * row, rows_SD.nbytes)

    def _close(self, begin: int, end: int) -> None:
        assert begin % mmap.PAGESIZE == end % mmap.PAGESIZE == 0
        memory = ctypes.c_void_p(self.address + begin), ctypes.c_size_t(end - begin)
        assert ctypes.CDLL(None).mprotect(*memory, 0) == 0


def _attend_guarded(begin: int, end: int, start: int, tokens: int, window: int, slots: int) -> None:
    """A chunk of one row, all that count but the last, whose query lies on a page that may not be touched either."""
    case = RollingCase(window, slots, (start,), (tokens - 1,), tokens, heads=1, kv_heads=1, head_dim=64)
    device, rng = CpuDevice(), np.random.default_rng(0)
    kind = TYPES["bfloat16"]
    rings = [_Guarded(rng.standard_normal((slots, 64)).astype(kind), begin, end) for _ in range(2)]
    queries = _Guarded(rng.standard_normal((slots, 64)).astype(kind), begin, end)
    start_B, count_B = device.upload(np.array([start], np.int64)), device.upload(np.array([tokens - 1], np.int64))
    attended = device.empty((1, tokens, 1, 64), kind)
    tensors = replace(
        RollingTensors(*(0,) * 11),
        key_ring=rings[0].address,
        value_ring=rings[1].address,
        start=start_B.address,
        count=count_B.address,
        attended=attended.address,
    )
    query = queries.address + (end - (tokens - 1)) * 128
    launch_rolling_prefill(device.launcher, case.problem, tensors, query, PrefillTiling(2, 1, 48))
    assert np.isfinite(device.download(attended).astype(np.float32)).all()


def test_what_no_query_sees_is_never_loaded() -> None:
    """Positions 25·page to 26·page - 1, in slots page to 2·page - 1, neither at the edge of a tile of 48.

    The last 33 see the ones before them.
    """
    page = mmap.PAGESIZE // 128 * 4  # slots of four pages
    _attend_guarded(page, 2 * page, 26 * page - 33, 34, page - 32, 8 * page)
    with pytest.raises(KernelFault, match="may not be touched"):
        _attend_guarded(page, 2 * page, 26 * page - 33, 34, page - 31, 8 * page)
    with pytest.raises(KernelFault, match="may not be touched"):
        _attend_guarded(page, 2 * page, 26 * page - 33, 35, page - 32, 8 * page)


@pytest.mark.parametrize("shared_bytes", SHARED_BYTES)
def test_every_problem_has_a_tiling_that_fits(shared_bytes: int) -> None:
    limits = DeviceLimits(1, shared_bytes, (8, 0))
    for head_dim in HEAD_DIMS:
        for activations in ACTIVATION_TYPES:
            for ring in RING_TYPES:
                for tokens in (2, 100):
                    problem = RollingCase(
                        9, 200, (0,), (2,), tokens, head_dim=head_dim, activations=activations, ring=ring
                    ).problem
                    tiling = prefill_tiling(problem, limits)
                    assert tiling.shared_bytes(problem) <= limits.shared_bytes
                    (kernel,) = rolling_prefill_kernels(problem, limits)
                    assert kernel.definitions["HEAD_DIM"] == head_dim


def test_too_little_shared_memory_is_refused() -> None:
    problem = RollingCase(9, 200, (0,), (2,), 100, head_dim=256).problem
    with pytest.raises(BackendError, match="shared memory"):
        rolling_prefill_kernels(problem, DeviceLimits(1, 48 << 10, (7, 5)))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"scale": -1.0}, "positive scale"),
        ({"scale": float("nan")}, "positive scale"),
        ({"slots": 2**30 + 1}, "slots"),
        ({"slots": 2**30, "batch": 4}, "vectors"),
    ],
)
def test_refusals(changed: dict[str, float], match: str) -> None:
    device = CpuDevice()
    problem = replace(RollingCase(9, 40, (0,), (2,), 4, heads=1, kv_heads=1).problem, **changed)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=match):
        launch_rolling_prefill(device.launcher, problem, RollingTensors(*(0,) * 11), 0)


def test_a_query_that_vectors_cannot_be_loaded_from_is_refused() -> None:
    problem = RollingCase(9, 40, (0,), (2,), 4).problem
    with pytest.raises(BackendError, match="rotated queries"):
        launch_rolling_prefill(CpuDevice().launcher, problem, RollingTensors(*(0,) * 11), 8)
