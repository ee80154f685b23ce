"""A double of `cuda.bindings.driver`: records every call and answers like a driver with one Hopper GPU."""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class CUdevice_attribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97


class CUfunction_attribute(enum.IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
    CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9


class CUstreamCaptureStatus(enum.IntEnum):
    CU_STREAM_CAPTURE_STATUS_NONE = 0
    CU_STREAM_CAPTURE_STATUS_ACTIVE = 1


ENUMS = (CUresult, CUdevice_attribute, CUfunction_attribute, CUstreamCaptureStatus)


@dataclass
class RecordingDriver:
    """calls: name and arguments of each call, in order. launched: the bytes of params at each launch."""

    params_bytes: int
    device: int
    context: int = 0xC0
    capturing: bool = False
    failing: str = ""
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    launched: list[bytes] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)
    attributes: dict[int, int] = field(default_factory=lambda: {16: 132, 97: 232448, 75: 9, 76: 0})

    def CUdevice(self, ordinal: int) -> SimpleNamespace:
        return SimpleNamespace(device=ordinal)

    def cuGetErrorString(self, error: int) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, b"invalid argument"

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def __getattr__(self, name: str) -> Any:
        for enumeration in ENUMS:
            if enumeration.__name__ == name:
                return enumeration
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: self._answer(name, arguments)

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self.calls.append((name, arguments))
        if name == self.failing:
            return (CUresult.CUDA_ERROR_INVALID_VALUE, *([None] * (name == "cuLibraryLoadData")))
        if name == "cuLaunchKernel":
            (first,) = (ctypes.c_void_p * 1).from_address(arguments[9])
            self.launched.append(ctypes.string_at(first or 0, self.params_bytes))
        if name == "cuMemAlloc":  # memory of the host will do
            self.memory.append(ctypes.create_string_buffer(arguments[0] + 512))
            start = ctypes.addressof(self.memory[-1])
            return (CUresult.CUDA_SUCCESS, start + -start % 512)
        if name in ("cuMemcpyHtoD", "cuMemcpyDtoH"):
            ctypes.memmove(*arguments)
            return (CUresult.CUDA_SUCCESS,)
        if name == "cuDeviceGetAttribute":
            return (CUresult.CUDA_SUCCESS, self.attributes[int(arguments[0])])
        results: dict[str, tuple[Any, ...]] = {
            "cuCtxGetDevice": (self.device,),
            "cuCtxGetCurrent": (self.context,),
            **dict.fromkeys(("cuInit", "cuCtxSetCurrent", "cuStreamSynchronize", "cuMemFree"), ()),
            "cuDeviceGet": (self.device,),
            "cuDevicePrimaryCtxRetain": (self.context,),
            "cuStreamCreate": (0x57,),
            "cuStreamIsCapturing": (CUstreamCaptureStatus(int(self.capturing)),),
            "cuLibraryLoadData": ("library",),
            "cuLibraryGetKernel": ("kernel",),
            "cuKernelGetParamInfo": (0, self.params_bytes),
            "cuKernelGetFunction": ("function",),
            "cuKernelSetAttribute": (),
            "cuFuncLoad": (),
            "cuLaunchKernel": (),
        }
        return (CUresult.CUDA_SUCCESS, *results[name])
