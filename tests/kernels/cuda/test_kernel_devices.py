"""Both devices of the kernels' tests hand back what they were given, and see what is written around it."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.cuda.recording_driver import RecordingDriver
from tests.support import kernel_devices
from tests.support.kernel_devices import CpuDevice, Device, GpuDevice


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> RecordingDriver:
    driver = RecordingDriver(params_bytes=8, device=900)
    monkeypatch.setattr(kernel_devices, "load_driver", lambda: driver)
    return driver


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, driver: RecordingDriver) -> Device:
    return CpuDevice() if request.param == "cpu" else GpuDevice()


@pytest.mark.parametrize("dtype", [np.float32, np.int64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1025,)])
def test_what_is_uploaded_comes_back(device: Device, shape: tuple[int, ...], dtype: type) -> None:
    array: kernel_devices.Array = np.asarray(np.random.default_rng(1).integers(-9, 9, shape), dtype)
    buffer = device.upload(array)
    assert buffer.address % 256 == 0
    got = device.download(buffer)
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(got, array)


def test_a_strided_array_is_uploaded_in_its_own_order(device: Device) -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)[:, ::2].T
    np.testing.assert_array_equal(device.download(device.upload(array)), array)


def test_what_is_not_written_yet_is_poison(device: Device) -> None:
    assert np.isnan(device.download(device.empty((7,), np.float16))).all()
    assert (device.download(device.empty((7,), np.int64)) == -1).all()


@pytest.mark.parametrize(
    ("offset", "said"),
    [
        (-1, "wrote 1 bytes before"),
        (-4096, "wrote 4096 bytes before"),
        (12, "wrote byte 12"),
        (255, "wrote byte 255"),
    ],
)
def test_writing_around_a_buffer_is_seen(device: Device, offset: int, said: str) -> None:
    buffer = device.upload(np.zeros(3, np.float32))
    ctypes.memset(buffer.address + offset, 0, 1)
    with pytest.raises(AssertionError, match=said):
        device.download(buffer)


def test_writing_far_behind_a_buffer_is_seen_on_a_gpu(driver: RecordingDriver) -> None:
    device = GpuDevice()
    buffer = device.upload(np.zeros(3, np.float32))
    ctypes.memset(buffer.address + 4095, 0, 1)
    with pytest.raises(AssertionError, match="wrote byte 4095"):
        device.download(buffer)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_what_lies_around_a_buffer_is_no_ordinary_number(device: Device, dtype: type) -> None:
    """A kernel that reads it by mistake gets a result that no test takes."""
    buffer = device.upload(np.zeros(1, dtype))
    around = np.frombuffer(ctypes.string_at(buffer.address - 16, 16), dtype).astype(np.float64)
    assert (np.isnan(around) | (np.abs(around) > 1e38)).all()


def test_a_gpu_is_waited_for_and_its_memory_freed(driver: RecordingDriver) -> None:
    device = GpuDevice()
    assert driver.names()[:5] == [
        "cuInit",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuStreamCreate",
    ]
    buffer = device.empty((4,), np.float32)
    driver.calls.clear()
    device.download(buffer)
    assert driver.names() == ["cuStreamSynchronize", "cuMemcpyDtoH"]
    address = buffer.allocation.address
    del buffer
    assert driver.calls[-1] == ("cuMemFree", (address,))
