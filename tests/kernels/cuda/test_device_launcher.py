"""What a launch asks of the CUDA driver, seen by a double of it; the driver's own signatures where it is installed."""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

import pytest
from cuda.bindings import driver as bindings

from runtime.errors import BackendError
from runtime.kernels.cuda.device_launcher import DeviceLauncher
from runtime.kernels.cuda.launch import DeviceLimits, Kernel
from tests.kernels.cuda import recording_driver
from tests.kernels.cuda.recording_driver import RecordingDriver

HERE = Path(__file__).resolve().parent
KERNEL = Kernel("probes.cu", "talk")
LOADING = ["cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetParamInfo", *["cuKernelSetAttribute"] * 2]
_ordinals = itertools.count(1000)


class Params(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint64), ("second", ctypes.c_uint64)]


@pytest.fixture
def driver() -> RecordingDriver:
    return RecordingDriver(ctypes.sizeof(Params), device=next(_ordinals))  # nothing is kept of one never seen


@pytest.fixture
def launcher(driver: RecordingDriver, tmp_path: Path) -> DeviceLauncher:
    return DeviceLauncher(0x57, sources=HERE, cache=tmp_path, driver=driver)


def launch(launcher: DeviceLauncher, params: ctypes.Structure | None = None) -> None:
    launcher.launch(KERNEL, grid=(4, 3, 2), threads=96, shared_bytes=1 << 17, params=params or Params(11, 22))


def test_a_device_is_asked_for_its_limits_once(
    driver: RecordingDriver, launcher: DeviceLauncher, tmp_path: Path
) -> None:
    assert launcher.limits == DeviceLimits(132, 232448, (9, 0))
    asked = len(driver.calls)
    assert DeviceLauncher(0, cache=tmp_path, driver=driver).limits == launcher.limits
    assert driver.names()[asked:] == ["cuCtxGetDevice"]


def test_a_first_launch_loads_and_the_next_only_launches(driver: RecordingDriver, launcher: DeviceLauncher) -> None:
    driver.calls.clear()
    launch(launcher)
    before = ["cuCtxGetCurrent", "cuStreamIsCapturing"]
    assert driver.names() == [*before, *LOADING, "cuKernelGetFunction", "cuFuncLoad", "cuLaunchKernel"]
    calls = dict(driver.calls)
    assert calls["cuLibraryLoadData"][0].startswith(b"\x7fELF")
    assert calls["cuLibraryLoadData"][1:] == (None, None, 0, None, None, 0)
    assert calls["cuLibraryGetKernel"] == ("library", b"talk")
    set_to = {}
    for name, (attribute, value, kernel, device) in (call for call in driver.calls if len(call[1]) == 4):
        assert (name, kernel, device.device) == ("cuKernelSetAttribute", "kernel", driver.device)
        set_to[int(attribute)] = value
    assert set_to == {8: 232448, 9: 100}
    arguments = calls["cuLaunchKernel"]
    assert arguments[:9] == ("kernel", 4, 3, 2, 96, 1, 1, 1 << 17, 0x57)
    assert arguments[10] == 0
    assert driver.launched == [bytes(Params(11, 22))]
    driver.calls.clear()
    launch(launcher, Params(33, 44))
    assert driver.names() == ["cuCtxGetCurrent", "cuLaunchKernel"]
    assert driver.launched[1] == bytes(Params(33, 44))


def test_another_launcher_of_the_device_finds_the_kernel_loaded(
    driver: RecordingDriver, launcher: DeviceLauncher, tmp_path: Path
) -> None:
    launcher.prepare([KERNEL, KERNEL])
    assert driver.names().count("cuLibraryLoadData") == 1
    driver.calls.clear()
    launch(DeviceLauncher(0x99, sources=HERE, cache=tmp_path, driver=driver))
    assert driver.names() == ["cuCtxGetDevice", "cuCtxGetCurrent", "cuLaunchKernel"]


def test_another_context_has_it_loaded_again_from_the_same_library(
    driver: RecordingDriver, launcher: DeviceLauncher
) -> None:
    launcher.prepare([KERNEL])
    driver.context += 16
    driver.calls.clear()
    launch(launcher)
    loading = ["cuStreamIsCapturing", "cuKernelGetFunction", "cuFuncLoad"]
    assert driver.names() == ["cuCtxGetCurrent", *loading, "cuLaunchKernel"]


def test_while_a_graph_is_captured_only_what_is_loaded_is_launched(
    driver: RecordingDriver, launcher: DeviceLauncher
) -> None:
    driver.capturing = True
    with pytest.raises(BackendError, match="talk would have to be loaded while a CUDA graph is captured"):
        launch(launcher)
    assert "cuLaunchKernel" not in driver.names()
    driver.capturing = False
    launcher.prepare([KERNEL])
    driver.capturing = True
    driver.calls.clear()
    launch(launcher)
    assert driver.names() == ["cuCtxGetCurrent", "cuLaunchKernel"]


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ("cuLaunchKernel", r"launch talk on a grid of \(4, 3, 2\) blocks of 96 threads.*: invalid argument"),
        ("cuLibraryLoadData", r"load talk: invalid argument \(CUDA_ERROR_INVALID_VALUE\)"),
    ],
)
def test_the_drivers_refusals_say_what_was_asked(
    failing: str, said: str, driver: RecordingDriver, launcher: DeviceLauncher
) -> None:
    driver.failing = failing
    with pytest.raises(BackendError, match=said):
        launch(launcher)
    driver.failing = ""
    launch(launcher)  # what failed is not taken for done


def test_without_a_context_there_is_no_launcher(driver: RecordingDriver) -> None:
    driver.failing = "cuCtxGetDevice"
    with pytest.raises(BackendError, match="could not tell which device is in use"):
        DeviceLauncher(0, driver=driver)


def test_an_unsupported_gpu_is_refused_with_its_first_kernel(driver: RecordingDriver, tmp_path: Path) -> None:
    driver.attributes |= {75: 7, 76: 5}
    launcher = DeviceLauncher(0, sources=HERE, cache=tmp_path, driver=driver)
    with pytest.raises(BackendError, match=r"not 7\.5"):
        launcher.prepare([KERNEL])


def test_a_struct_of_another_size_is_refused(driver: RecordingDriver, launcher: DeviceLauncher) -> None:
    driver.params_bytes = 24
    with pytest.raises(BackendError, match=r"talk takes a struct of 24 bytes and was given 16: Params"):
        launch(launcher)


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match="need NVIDIA's driver and the package cuda-bindings"):
        DeviceLauncher(0)


def test_the_real_module_has_what_the_double_has() -> None:
    for enum in recording_driver.ENUMS:
        real = getattr(bindings, enum.__name__)
        assert {member: int(getattr(real, member.name)) for member in enum} == {member: int(member) for member in enum}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cuCtxGetCurrent", 0),
        ("cuCtxGetDevice", 0),
        ("cuDeviceGetAttribute", 2),
        ("cuStreamIsCapturing", 1),
        ("cuLibraryLoadData", 7),
        ("cuLibraryGetKernel", 2),
        ("cuKernelGetParamInfo", 2),
        ("cuKernelGetFunction", 1),
        ("cuKernelSetAttribute", 4),
        ("cuFuncLoad", 1),
        ("cuLaunchKernel", 11),
        ("cuGetErrorString", 1),
    ],
)
def test_the_real_calls_take_as_many_arguments(name: str, parameters: int) -> None:
    signature = getattr(bindings, name).__doc__.split("\n", 1)[0]
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    for container in ("tuple[CUjit_option] | list[CUjit_option]", "tuple[Any] | list[Any]"):
        inside = inside.replace(container, "values")
    assert len([part for part in inside.split(",") if part.strip()]) == parameters, signature
