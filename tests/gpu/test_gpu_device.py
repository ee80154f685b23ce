"""The checks' way to a GPU, with a driver whose launches run on the CPU: what a GPU would be asked, in its order."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from runtime.kernels.cuda import device_launcher
from runtime.kernels.cuda.launch import DeviceLimits
from tests.gpu import device as gpu_device
from tests.gpu.attention_checks import check_decode, check_prefill, check_write
from tests.gpu.device import OnGpu
from tests.gpu.expert_checks import check_top
from tests.gpu.findings import Check, Launched, Notebook
from tests.gpu.graph_checks import check_graph
from tests.gpu.simulated_driver import SimulatedDriver, fake_cubin
from tests.kernels.cuda.rolling_cases import RollingCase
from tests.kernels.cuda.rolling_decode_cases import step
from tests.support import kernel_devices


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimulatedDriver:
    sizes: dict[str, int] = {}  # which test_device_launcher.py looks at; here they are what each launch gives
    driver = SimulatedDriver(sizes)
    for module in (kernel_devices, gpu_device, device_launcher):
        monkeypatch.setattr(module, "load_driver", lambda: driver)
    monkeypatch.setattr(device_launcher, "compile_kernel", fake_cubin)
    monkeypatch.setattr(device_launcher, "_devices", {})
    launch = device_launcher.DeviceLauncher.launch

    def noting(self: Any, kernel: Any, *, params: ctypes.Structure, **shape: Any) -> None:
        sizes[kernel.name] = ctypes.sizeof(params)
        launch(self, kernel, params=params, **shape)

    monkeypatch.setattr(device_launcher.DeviceLauncher, "launch", noting)
    return driver


def held(book: Notebook) -> list[bool]:
    return [finding.held for finding in book.findings if isinstance(finding, Check)]


def notebook() -> Notebook:
    return Notebook("kernels", seed=4, say=lambda line: None)


def test_kernels_run_and_are_noted(driver: SimulatedDriver) -> None:
    book = notebook()
    device = OnGpu(book.launched)
    chunk = RollingCase(20, 60, (100, 7), (12, 5), 12)
    check_decode(device, book, [("decode", step(20, 23, (5, -1, 61)))])
    check_prefill(device, book, [("prefill", chunk)])
    check_write(device, book, [("write", chunk)])
    assert held(book) == [True] * 4
    noted = {finding.kernel.split()[1] for finding in book.findings if isinstance(finding, Launched)}
    assert noted == {"rolling_decode", "rolling_prefill", "rolling_write"}


def test_a_step_is_captured_and_replayed(driver: SimulatedDriver) -> None:
    case = RollingCase(20, 23, (18, 0), (1, 1), heads=4, head_dim=16)
    check_graph(OnGpu(lambda kernel: None), case, 4, seed=3)
    assert driver.replays == 4


def test_launchers_may_believe_in_other_limits(driver: SimulatedDriver) -> None:
    """But never in more shared memory than there is, or another architecture."""
    device = OnGpu(lambda kernel: None).believing(DeviceLimits(7, 1 << 30, (8, 0)))
    assert device.launcher.limits == DeviceLimits(7, driver.limits.shared_bytes, (9, 0))
    smaller = OnGpu(lambda kernel: None).believing(DeviceLimits(7, 99 << 10, (8, 9)))
    assert smaller.launcher.limits.shared_bytes == 99 << 10


def test_buffers_are_overwritten_in_place(driver: SimulatedDriver) -> None:
    device = OnGpu(lambda kernel: None)
    buffer = device.upload(np.zeros((3, 2), np.float32))
    device.write(buffer, np.ones((2, 3), np.float32).T)
    np.testing.assert_array_equal(device.download(buffer), np.ones((3, 2)))
    with pytest.raises(AssertionError):
        device.write(buffer, np.ones(6, np.float32))


def test_sampling(driver: SimulatedDriver) -> None:
    book = notebook()
    check_top(OnGpu(book.launched), book, large=False)
    assert all(held(book))
    assert len(held(book)) == 35
