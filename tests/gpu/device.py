"""Where the checks run: a GPU with what they need beyond tests/support/kernel_devices.py, or the CPU in its place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.kernels.cuda.device_launcher import DeviceLauncher, checked, load_driver
from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from tests.support.kernel_devices import Buffer, CpuDevice, Device, GpuDevice

Array = npt.NDArray[Any]
Launches = Callable[[Launcher], None]


def described(kernel: Kernel) -> str:
    """A kernel as one line, the same in every process."""
    return f"{kernel.source} {kernel.name} " + " ".join(f"{key}={value}" for key, value in kernel.definitions.items())


@dataclass(frozen=True, slots=True)
class NotedLauncher:
    """Launches, and says which kernels. limits: the device's, or others that launchers are to believe in."""

    launcher: Launcher
    limits: DeviceLimits
    note: Callable[[str], None]

    def launch(
        self, kernel: Kernel, *, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        """See Launcher."""
        self.launcher.launch(kernel, grid=grid, threads=threads, shared_bytes=shared_bytes, params=params)
        self.note(described(kernel))


class CheckedDevice(Device, Protocol):
    """A Device on which a check may also overwrite a buffer, and replay what was launched."""

    def write(self, buffer: Buffer, array: Array) -> None:
        """Other content for a buffer, at the same address. Its guards stay."""
        ...

    def captured(self, launches: Launches) -> Callable[[], None]:
        """What runs `launches` once more, as a graph where there are graphs. It ran once before."""
        ...

    def believing(self, limits: DeviceLimits) -> CheckedDevice:
        """The same device, whose launchers divide their work as for another one."""
        ...


class OnGpu:
    """The GPU. note: told each kernel that ran."""

    def __init__(self, note: Callable[[str], None], device: GpuDevice | None = None) -> None:
        self._device, self._note = device or GpuDevice(), note
        self._driver = load_driver()
        self._limits = self._device.launcher.limits

    @property
    def launcher(self) -> Launcher:
        return NotedLauncher(self._device.launcher, self._limits, self._note)

    def upload(self, array: Array) -> Buffer:
        return self._device.upload(np.ascontiguousarray(array))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        return self._device.empty(shape, dtype)

    def download(self, buffer: Buffer) -> Array:
        self._call("finish what was launched", "cuCtxSynchronize")
        return self._device.download(buffer)

    def write(self, buffer: Buffer, array: Array) -> None:
        content = np.ascontiguousarray(array)
        assert (content.shape, content.dtype) == (buffer.shape, buffer.dtype)
        self._call("finish what was launched", "cuCtxSynchronize")
        if content.nbytes:
            self._call("copy from the host", "cuMemcpyHtoD", buffer.address, content.ctypes.data, content.nbytes)

    def captured(self, launches: Launches) -> Callable[[], None]:
        driver = self._driver
        # Not a stream that waits for the default one: work on that would end the capture.
        flags = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        stream = self._call("make a stream", "cuStreamCreate", flags)
        launcher = NotedLauncher(DeviceLauncher(int(stream)), self._limits, self._note)
        launches(launcher)
        self._call("finish what was launched", "cuCtxSynchronize")
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("begin a capture", "cuStreamBeginCapture", stream, mode)
        try:
            launches(launcher)
        finally:
            graph = self._call("end a capture", "cuStreamEndCapture", stream)
        executable = self._call("prepare a graph", "cuGraphInstantiate", graph, 0)

        def replay() -> None:
            self._call("launch a graph", "cuGraphLaunch", executable, stream)
            self._call("finish a graph", "cuStreamSynchronize", stream)

        return replay

    def believing(self, limits: DeviceLimits) -> OnGpu:
        other = OnGpu(self._note, self._device)
        capability = self._limits.compute_capability
        shared_bytes = min(limits.shared_bytes, self._limits.shared_bytes)
        other._limits = replace(limits, shared_bytes=shared_bytes, compute_capability=capability)
        return other

    def _call(self, what: str, name: str, *arguments: Any) -> Any:
        return checked(self._driver, what, getattr(self._driver, name)(*arguments))


class OnCpu:
    """The CPU in its place, for testing this script: nothing that it says is about a GPU."""

    def __init__(self, note: Callable[[str], None], device: CpuDevice | None = None) -> None:
        self._device, self._note = device or CpuDevice(), note

    @property
    def launcher(self) -> Launcher:
        return NotedLauncher(self._device.launcher, self._device.launcher.limits, self._note)

    def upload(self, array: Array) -> Buffer:
        return self._device.upload(np.ascontiguousarray(array))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        return self._device.empty(shape, dtype)

    def download(self, buffer: Buffer) -> Array:
        return self._device.download(buffer)

    def write(self, buffer: Buffer, array: Array) -> None:
        content = np.ascontiguousarray(array)
        assert (content.shape, content.dtype) == (buffer.shape, buffer.dtype)
        ctypes.memmove(buffer.address, content.ctypes.data, content.nbytes)

    def captured(self, launches: Launches) -> Callable[[], None]:
        launches(self.launcher)
        return lambda: launches(self.launcher)

    def believing(self, limits: DeviceLimits) -> OnCpu:
        return OnCpu(self._note, CpuDevice(limits))
