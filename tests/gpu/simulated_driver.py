"""A double of `cuda.bindings.driver` whose memory is the host's and whose launches run on the CPU.

So all that stands between a check and a GPU's driver runs as it will there: uploads, launches, graphs. It refuses what
a driver would: handles that it did not give, kernels that are not loaded, work on other streams while one is captured.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import pickle
from dataclasses import dataclass, field
from typing import Any

from runtime.kernels.cuda.compiler import CompiledKernel
from runtime.kernels.cuda.launch import DeviceLimits, Kernel
from tests.kernels.cuda.recording_driver import (
    CUdevice_attribute,
    CUfunction_attribute,
    CUresult,
    CUstreamCaptureStatus,
)
from tests.support.cuda_cpu import LIMITS, CpuLauncher


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUstream_flags(enum.IntEnum):
    CU_STREAM_NON_BLOCKING = 1


@dataclass
class _Launch:
    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    params: bytes


def fake_cubin(kernel: Kernel, *ignored: Any, **options: Any) -> CompiledKernel:
    """In the place of compile_kernel: code that says what it is made of."""
    told = pickle.dumps((kernel.source, kernel.name, dict(kernel.definitions)))
    return CompiledKernel(kernel, told, registers=32, spilled_bytes=0, stack_bytes=0)


@dataclass
class SimulatedDriver:
    """params_bytes: of each kernel's struct, by its name. replays: how often a graph ran."""

    params_bytes: dict[str, int]
    limits: DeviceLimits = LIMITS
    replays: int = 0
    _given: dict[int, Any] = field(default_factory=dict)
    _numbers: Any = field(default_factory=lambda: itertools.count(1000))
    _captured: dict[int, list[_Launch]] = field(default_factory=dict)
    _launcher: CpuLauncher = field(default_factory=CpuLauncher)

    CUresult, CUdevice_attribute, CUfunction_attribute = CUresult, CUdevice_attribute, CUfunction_attribute
    CUstreamCaptureStatus, CUstreamCaptureMode = CUstreamCaptureStatus, CUstreamCaptureMode
    CUstream_flags, CUdevice = CUstream_flags, int

    def _handle(self, value: Any) -> int:
        number = next(self._numbers)
        self._given[number] = value
        return int(number)

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 13000

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (CUresult.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 77

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 0xC0

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        assert context == 0xC0
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 0xC0

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 77

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:
        major, minor = self.limits.compute_capability
        told = {16: self.limits.multiprocessors, 97: self.limits.shared_bytes, 75: major, 76: minor}
        return CUresult.CUDA_SUCCESS, told[int(attribute)]

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        assert not self._captured, "a wait ends a capture"
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert self._given[stream] == "stream"
        assert stream not in self._captured, "a wait ends a capture"
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self._handle("stream")

    def cuStreamIsCapturing(self, stream: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, CUstreamCaptureStatus(int(stream in self._captured))

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, ...]:
        memory = ctypes.create_string_buffer(nbytes + 512)
        start = ctypes.addressof(memory)
        address = start + -start % 512
        self._given[address] = memory
        return CUresult.CUDA_SUCCESS, address

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        del self._given[address]
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyHtoD(self, address: int, source: int, nbytes: int) -> tuple[Any, ...]:
        assert not self._captured, "a copy on the default stream ends a capture"
        ctypes.memmove(address, source, nbytes)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoH(self, target: int, address: int, nbytes: int) -> tuple[Any, ...]:
        return self.cuMemcpyHtoD(target, address, nbytes)

    def cuLibraryLoadData(self, code: bytes, *options: Any) -> tuple[Any, ...]:
        assert options == (None, None, 0, None, None, 0)
        return CUresult.CUDA_SUCCESS, self._handle(pickle.loads(code))

    def cuLibraryGetKernel(self, library: int, name: bytes) -> tuple[Any, ...]:
        kernel = Kernel(*self._given[library])
        assert kernel.name == name.decode()
        return CUresult.CUDA_SUCCESS, self._handle(kernel)

    def cuKernelGetParamInfo(self, kernel: int, index: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 0, self.params_bytes[self._given[kernel].name]

    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: int, device: int) -> tuple[Any, ...]:
        carveout = CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        assert (value, device) == (100 if attribute == carveout else self.limits.shared_bytes, 77)
        return (CUresult.CUDA_SUCCESS,)

    def cuKernelGetFunction(self, kernel: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, kernel

    def cuFuncLoad(self, function: int) -> tuple[Any, ...]:
        assert not self._captured, "loading ends a capture"
        return (CUresult.CUDA_SUCCESS,)

    def cuLaunchKernel(self, kernel: int, *arguments: int) -> tuple[Any, ...]:
        x, y, z, threads, one, also_one, shared_bytes, stream, params, extra = arguments
        assert (one, also_one, extra) == (1, 1, 0)
        known = self._given[kernel]
        (first,) = (ctypes.c_void_p * 1).from_address(params)
        content = ctypes.string_at(first or 0, self.params_bytes[known.name])
        launch = _Launch(known, (x, y, z), threads, shared_bytes, content)
        if stream in self._captured:
            self._captured[stream].append(launch)
        else:
            assert not self._captured, "a launch outside of the capture"
            self._run(launch)
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        assert self._given[stream] == "stream"
        assert mode == CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._captured[stream] = []
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self._handle(self._captured.pop(stream))

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self._handle(list(self._given[graph]))

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[Any, ...]:
        assert self._given[stream] == "stream"
        self.replays += 1
        for launch in self._given[executable]:
            self._run(launch)
        return (CUresult.CUDA_SUCCESS,)

    def _run(self, launch: _Launch) -> None:
        size = len(launch.params)
        params = type("Params", (ctypes.Structure,), {"_fields_": [("content", ctypes.c_uint8 * size)]})()
        ctypes.memmove(ctypes.addressof(params), launch.params, size)
        self._launcher.launch(
            launch.kernel,
            grid=launch.grid,
            threads=launch.threads,
            shared_bytes=launch.shared_bytes,
            params=params,
        )
