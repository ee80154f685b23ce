"""The stand-in for a GPU does what a GPU does, and sees what a GPU may let pass."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel
from tests.support.cuda_cpu import LIMITS, CpuLauncher, KernelFault
from tests.support.kernel_devices import CpuDevice

HERE = Path(__file__).resolve().parent
Floats = npt.NDArray[np.float32]


class ThreePointers(ctypes.Structure):
    """Convert (whose third field is its count), Product and, with two fields, the other structs of probes.cu."""

    _fields_ = [("first", ctypes.c_uint64), ("second", ctypes.c_uint64), ("third", ctypes.c_uint64)]


class TwoPointers(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint64), ("second", ctypes.c_uint64)]


class OnePointer(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint64)]


class FourPointers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("first", "second", "third", "fourth")]


class Mistake(ctypes.Structure):
    _fields_ = [("to", ctypes.c_uint64), ("from_", ctypes.c_uint64), ("index", ctypes.c_int)]


def launch(
    name: str, params: ctypes.Structure, threads: int, *, grid: tuple[int, int, int] = (1, 1, 1), shared: int = 0
) -> None:
    CpuLauncher(seed=3, sources=HERE).launch(
        Kernel("probes.cu", name), grid=grid, threads=threads, shared_bytes=shared, params=params
    )


def converted(name: str, values: npt.NDArray[np.generic], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    device = CpuDevice()
    given, got = device.upload(values), device.empty(values.shape, dtype)
    launch(name, ThreePointers(given.address, got.address, values.size), 128)
    return device.download(got)


def floats(*values: float) -> Floats:
    return np.array(values, np.float32)


def bits(array: npt.NDArray[np.generic], unsigned: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """The array's bits, all NaNs made one: which NaN it is no kernel relies on."""
    nan = np.isnan(array.astype(np.float32))
    return np.where(nan, np.iinfo(unsigned).max, array.view(unsigned))


FORMATS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float8": ml_dtypes.float8_e4m3fn}


@pytest.mark.parametrize("form", FORMATS)
def test_every_number_of_a_type_becomes_the_same_float(form: str) -> None:
    dtype = np.dtype(FORMATS[form])
    count = 1 << 8 * dtype.itemsize
    values = np.arange(count, dtype=f"u{dtype.itemsize}").view(dtype)
    got = converted(f"widen_{form}", values, np.float32)
    np.testing.assert_array_equal(bits(got, np.uint32), bits(values.astype(np.float32), np.uint32))


@pytest.mark.parametrize("form", FORMATS)
def test_floats_round_to_nearest_with_ties_to_even(form: str) -> None:
    dtype = np.dtype(FORMATS[form])
    all_values = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype).astype(np.float32)
    positive = np.unique(all_values[np.isfinite(all_values) & (all_values >= 0)])
    past = 2 * positive[-1].astype(np.float64) - positive[-2]
    ladder = np.append(positive.astype(np.float64), past)
    middles = ((ladder[1:] + ladder[:-1]) / 2).astype(np.float32)  # exact: one bit more than the type has
    exact = np.concatenate([positive, middles])
    near = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
    strange = np.random.default_rng(5).integers(0, 1 << 32, 20000, np.uint32).view(np.float32)
    values = np.concatenate([near, -near, strange, floats(np.inf, -np.inf, np.nan, 0.0, -0.0)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(dtype)
    unsigned = f"u{dtype.itemsize}"
    np.testing.assert_array_equal(bits(converted(f"narrow_{form}", values, dtype), unsigned), bits(expected, unsigned))
    if form != "float8":
        pairs = converted(f"pack_{form}", values, np.uint32).view(dtype).reshape(-1, 2)
        np.testing.assert_array_equal(bits(pairs[:, 0].copy(), unsigned), bits(expected, unsigned))
        np.testing.assert_array_equal(bits(pairs[:, 1].copy(), unsigned), bits(-expected, unsigned))


def test_powers_and_inverses_stay_within_two_units_of_the_last_place() -> None:
    values = np.concatenate([np.linspace(-125, 127, 4001), [0.0, -np.inf]]).astype(np.float32)
    exact = np.exp2(values.astype(np.float64))
    off = np.abs(converted("power", values, np.float32) - exact)
    assert (off <= 2 * np.spacing(exact.astype(np.float32))).all()
    assert (converted("power", floats(-130.0, -200.0), np.float32) == 0).all(), "denormal results are flushed"
    assert np.isnan(converted("power", floats(np.nan), np.float32)).all()
    np.testing.assert_array_equal(converted("inverse", values[:100], np.float32), np.float32(1) / values[:100])


@pytest.mark.parametrize("form", ["bfloat16", "float16"])
def test_a_tensor_core_multiplies_fragments(form: str) -> None:
    dtype, rng, device = FORMATS[form], np.random.default_rng(7), CpuDevice()
    a_MK = rng.standard_normal((16, 16), np.float32).astype(dtype)
    b_NK = rng.standard_normal((8, 16), np.float32).astype(dtype)
    d_2MN = rng.standard_normal((2, 16, 8), np.float32)
    a, b, d = device.upload(a_MK), device.upload(b_NK), device.upload(d_2MN)
    launch(f"multiply_{form}", ThreePointers(a.address, b.address, d.address), 64)
    product = a_MK.astype(np.float64) @ b_NK.astype(np.float64).T
    magnitude = np.abs(a_MK).astype(np.float64) @ np.abs(b_NK).astype(np.float64).T + np.abs(d_2MN)
    assert (np.abs(device.download(d) - (d_2MN + product)) <= 16 * 2.0**-23 * magnitude).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_tensor_core_cuts_off_what_does_not_fit(sign: int) -> None:
    device = CpuDevice()
    a, b = device.upload(np.ones((16, 16), np.float16)), device.upload(np.full((8, 16), sign * 1.5, np.float16))
    d = device.upload(np.full((2, 16, 8), sign * 2.0**24, np.float32))  # there, the step is 2
    launch("multiply_float16", ThreePointers(a.address, b.address, d.address), 64)
    assert (device.download(d) == sign * 2.0**24).all()


def test_a_tensor_core_overflows_to_infinity_and_keeps_nan() -> None:
    device = CpuDevice()
    a_MK, b_NK = np.zeros((16, 16), ml_dtypes.bfloat16), np.ones((8, 16), ml_dtypes.bfloat16)
    a_MK[0, :2] = 3e38
    a_MK[1, 0] = np.nan
    a_MK[2, :4] = [3e38, 3e38, -3e38, -3e38]
    a, b, d = device.upload(a_MK), device.upload(b_NK), device.upload(np.zeros((2, 16, 8), np.float32))
    launch("multiply_bfloat16", ThreePointers(a.address, b.address, d.address), 64)
    got = device.download(d)
    assert (got[:, 0] == np.inf).all()
    assert np.isnan(got[:, 1]).all()
    assert (got[:, 2] == np.inf).all()
    assert (got[:, 3:] == 0).all()


def test_matrices_are_loaded_as_the_tensor_core_takes_them() -> None:
    device = CpuDevice()
    elements = np.random.default_rng(8).integers(0, 1 << 16, (4, 8, 8), np.uint16)
    given, got = device.upload(elements), device.empty((2, 32, 4, 2), np.uint16)
    launch("matrices", TwoPointers(given.address, got.address), 32, shared=512)
    straight = elements.reshape(4, 32, 2).transpose(1, 0, 2)
    turned = elements.transpose(0, 2, 1).reshape(4, 32, 2).transpose(1, 0, 2)
    np.testing.assert_array_equal(device.download(got), np.stack([straight, turned]))


def test_lanes_of_a_warp_talk_to_each_other() -> None:
    device = CpuDevice()
    x = np.random.default_rng(9).integers(-99, 99, 96).astype(np.float32)
    counted, swapped = device.upload(np.zeros(1, np.uint32)), device.upload(np.zeros(1, np.uint64))
    given, got = device.upload(x), device.empty((4, 96), np.float32)
    launch("talk", FourPointers(given.address, got.address, counted.address, swapped.address), 96, grid=(3, 1, 1))
    warps, lanes = x.reshape(3, 32), np.arange(32)
    sums, asked, mixed, votes = device.download(got)
    np.testing.assert_array_equal(sums, np.repeat(warps.sum(1), 32))
    np.testing.assert_array_equal(asked.reshape(3, 32), warps[:, (lanes * 5 + 1) % 32])
    words = warps.view(np.uint32)
    np.testing.assert_array_equal(mixed.view(np.uint32).reshape(3, 32), words[:, [7]] ^ words[:, lanes ^ 3] ^ words)
    expected = ((warps > 0).astype(np.uint64) << lanes.astype(np.uint64)).sum(1).astype(np.uint32)
    np.testing.assert_array_equal(votes.view(np.uint32), np.repeat(expected, 32))
    assert device.download(counted)[0] == 3 * sum(range(96))
    assert device.download(swapped)[0] in (1, 2, 3)


def test_every_thread_of_every_block_runs_once() -> None:
    device = CpuDevice()
    got = device.upload(np.zeros((2, 3, 4, 64, 7), np.uint32))
    launch("places", OnePointer(got.address), 64, grid=(4, 3, 2))
    z, y, x, t = np.indices((2, 3, 4, 64))
    expected = np.stack([x, y, z, np.full_like(x, 432), t, t // 32, t % 32], axis=-1)
    np.testing.assert_array_equal(device.download(got), expected)


def test_an_asynchronous_copy_lands_when_it_is_waited_for() -> None:
    device = CpuDevice()
    source = np.random.default_rng(10).integers(0, 255, (2, 64, 16)).astype(np.uint8)
    given, got = device.upload(source), device.empty((6, 64, 16), np.uint8)
    launch("copies", TwoPointers(given.address, got.address), 64, shared=3 * 1024)
    poison, nothing = np.full_like(source[0], 0xFF), np.zeros_like(source[0])
    expected = np.stack([poison, source[0], poison, source[1], nothing, source[0]])
    np.testing.assert_array_equal(device.download(got), expected)


def make(mistake: int, seed: int = 0) -> Floats:
    device = CpuDevice()
    to, given = device.empty((128,), np.float32), device.upload(np.zeros(128, np.float32))
    index = {5: 250, 14: 4, 18: 32, 21: 256, 22: 1}.get(mistake, 0)
    CpuLauncher(seed=seed, sources=HERE).launch(
        Kernel("faulty.cu", "faulty", {"MISTAKE": mistake}),
        grid=(1, 1, 1),
        threads=128,
        shared_bytes=1000,  # not a multiple of what it is aligned to
        params=Mistake(to.address, given.address, index),
    )
    return device.download(to)


def test_without_a_mistake_the_kernel_runs() -> None:
    np.testing.assert_array_equal(make(0), np.arange(128) % 4)


@pytest.mark.parametrize("mistake", [1, 2, 3, 4, 6, 7])
def test_missing_synchronisation_shows_in_the_numbers(mistake: int) -> None:
    thread = np.arange(128)
    other = (thread + 37) % 128
    meant = {1: other, 2: thread ^ 1, 3: 2 * other + 128, 4: 0 * thread, 6: 0 * thread, 7: other}[mistake]
    for seed in range(3):
        assert not np.array_equal(make(mistake, seed), meant + thread % 4)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (5, "byte 1000 was written, outside the 1000 bytes"),
        (8, "not all lanes of warp"),
        (9, "the warp has diverged"),
        (10, "while others wait at block_sync in faulty.cu|have left the kernel before this barrier"),
        (11, "while others wait at block_sync in faulty.cu|have left the kernel before this barrier"),
        (12, "misaligned access"),
        (13, "last at load_16 in faulty.cu:.* is not aligned to 16 bytes"),
        (14, "index outside an array"),
        (15, "may not be touched"),
        (16, "byte 0 of shared memory where global memory belongs"),
        (17, "is outside the 1000 bytes of shared memory"),
        (18, "overflow or shift"),
        (19, "may not be touched"),
        (20, "byte 262144 is outside the 1000 bytes of shared memory"),
        (21, "a check failed|division by zero"),
        (22, "may not be touched"),
        (23, "misaligned access"),
        (24, "misaligned access"),
        (26, "last at copy_async_16 in faulty.cu:.* a copy to the same bytes is under way"),
        (25, "last at copy_async_16 in faulty.cu:.* is not aligned to 16 bytes"),
    ],
)
def test_what_a_gpu_may_not_survive_is_refused(mistake: int, said: str) -> None:
    for seed in range(2):
        with pytest.raises(AssertionError, match=said):
            make(mistake, seed)
    np.testing.assert_array_equal(make(0), np.arange(128) % 4)  # and the process goes on


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 48}, "no multiple of 32"),
        ({"threads": 192}, "more threads than it is compiled for"),
        ({"grid": (1, 0, 1)}, "grid is empty"),
        ({"grid": (1, 70000, 1)}, "too large"),
        ({"params": TwoPointers(0, 0)}, "another size in C++"),
    ],
)
def test_a_launch_that_a_gpu_refuses_is_refused(change: dict[str, object], said: str) -> None:
    launcher = CpuLauncher(sources=HERE)
    arguments = {"grid": (1, 1, 1), "threads": 128, "shared_bytes": 512, "params": Mistake(0, 0, 0)} | change
    with pytest.raises(KernelFault, match=said.replace("+", r"\+")):
        launcher.launch(Kernel("faulty.cu", "faulty", {"MISTAKE": 0}), **arguments)  # type: ignore[arg-type]


def test_more_shared_memory_than_the_device_has_is_refused() -> None:
    limits = DeviceLimits(multiprocessors=1, shared_bytes=1024, compute_capability=(8, 0))
    with pytest.raises(BackendError, match="1025 bytes of shared memory"):
        CpuLauncher(limits, sources=HERE).launch(
            Kernel("faulty.cu", "faulty"), grid=(1, 1, 1), threads=128, shared_bytes=1025, params=Mistake(0, 0, 0)
        )
    assert CpuDevice(limits).launcher.limits == limits
    assert CpuDevice().launcher.limits == LIMITS


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(KernelFault, match=r"device\.cuh"):
        CpuLauncher(sources=HERE).launch(
            Kernel("probes.cu", "talk", {"Float16": "1 +"}),
            grid=(1, 1, 1),
            threads=32,
            shared_bytes=0,
            params=OnePointer(0),
        )
