"""Runs kernels on a GPU: a Launcher over the CUDA driver (`cuda.bindings.driver`), on a stream of the caller's."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import BackendError
from runtime.kernels.cuda.compiler import SOURCES, compile_kernel
from runtime.kernels.cuda.launch import DeviceLimits, Kernel


def load_driver() -> Any:
    """The module `cuda.bindings.driver`. Raises BackendError if it or the driver is not there."""
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package finds no driver
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BackendError(
            f"CUDA kernels need NVIDIA's driver and the package cuda-bindings, which cannot be used here ({reason})."
        ) from error
    return driver


def checked(driver: Any, what: str, answer: tuple[Any, ...]) -> Any:
    """What a call of the driver gave besides its status: nothing, one value, or a tuple. Raises BackendError."""
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        said = text.decode(errors="replace") if text else "no description"
        raise BackendError(f"The GPU could not {what}: {said} ({getattr(status, 'name', status)}).")
    return values[0] if len(values) == 1 else tuple(values) or None


@dataclass(slots=True)
class _Device:
    """What is kept for a device as long as the process lives. loaded: kernels of which its driver holds the code."""

    limits: DeviceLimits
    loaded: dict[tuple[Kernel, Path], _Loaded] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Loaded:
    handle: Any
    params_bytes: int
    contexts: set[int] = field(default_factory=set)
    """The contexts in which it can be launched without loading anything."""


_ALL_OF_IT = 100
"""Percent of the memory that shared memory and the L1 cache divide between them."""
_devices: dict[int, _Device] = {}
_lock = threading.Lock()


class DeviceLauncher:
    """Launches on `stream`, in the context that is current; cheap to make, so that each call may have its own.

    stream: a CUstream's address; 0 is the default stream. Kernels are compiled (see `compile_kernel`) and loaded at
    first use and kept for all launchers of the process. That may not happen while a stream is captured into a CUDA
    graph: call `prepare` before. Safe to use from several threads.

    Raises BackendError if no context is current, and for a GPU that the kernels are not made for at the first kernel.
    """

    def __init__(
        self, stream: int, *, sources: Path = SOURCES, cache: Path | None = None, driver: Any | None = None
    ) -> None:
        self._driver = driver or load_driver()
        self._stream = stream
        self._sources = sources
        self._cache = cache
        self._device = int(self._call("tell which device is in use", "cuCtxGetDevice"))
        with _lock:
            if self._device not in _devices:
                _devices[self._device] = _Device(self._read_limits())
        self._kept = _devices[self._device]

    @property
    def limits(self) -> DeviceLimits:
        """The device's."""
        return self._kept.limits

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Compile and load kernels for the current context, so that launching them later loads nothing."""
        for kernel in kernels:
            self._load(kernel)

    def launch(
        self, kernel: Kernel, *, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        """See Launcher. Raises BackendError also when the kernel takes a struct of another size than `params`."""
        loaded = self._load(kernel)
        if ctypes.sizeof(params) != loaded.params_bytes:
            raise BackendError(
                f"{kernel.name} takes a struct of {loaded.params_bytes} bytes and was given {ctypes.sizeof(params)}: "
                f"{type(params).__name__} does not mirror the one in {kernel.source}."
            )
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._call(
            f"launch {kernel.name} on a grid of {grid} blocks of {threads} threads and {shared_bytes} shared bytes",
            "cuLaunchKernel",
            *(loaded.handle, *grid, threads, 1, 1, shared_bytes, self._stream, ctypes.addressof(arguments), 0),
        )

    def _load(self, kernel: Kernel) -> _Loaded:
        context = int(self._call("tell which context is in use", "cuCtxGetCurrent"))
        known = self._kept.loaded.get((kernel, self._sources))
        if known is not None and context in known.contexts:
            return known
        with _lock:
            self._refuse_capture(kernel)
            known = self._kept.loaded.get((kernel, self._sources)) or self._read(kernel)
            # Code is loaded lazily, by default: these two have it loaded into this context now.
            function = self._call(f"load {kernel.name}", "cuKernelGetFunction", known.handle)
            self._call(f"load {kernel.name}", "cuFuncLoad", function)
            known.contexts.add(context)
            self._kept.loaded[kernel, self._sources] = known
        return known

    def _read(self, kernel: Kernel) -> _Loaded:
        """Hands the machine code to the driver, which keeps it for every context of the device."""
        driver, what = self._driver, f"load {kernel.name}"
        compiled = compile_kernel(kernel, self.limits.compute_capability, sources=self._sources, cache=self._cache)
        library = self._call(what, "cuLibraryLoadData", compiled.cubin, None, None, 0, None, None, 0)
        handle = self._call(what, "cuLibraryGetKernel", library, kernel.name.encode())
        _, params_bytes = self._call(what, "cuKernelGetParamInfo", handle, 0)
        # Beyond 48 KiB a kernel has to be told; what is allowed here costs nothing unless a launch asks for it. And
        # launchers count on as many blocks at once as all of a multiprocessor's shared memory has room for.
        attributes, device = driver.CUfunction_attribute, driver.CUdevice(self._device)
        for attribute, value in (
            (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.limits.shared_bytes),
            (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, _ALL_OF_IT),
        ):
            self._call(what, "cuKernelSetAttribute", attribute, value, handle, device)
        return _Loaded(handle, int(params_bytes))

    def _refuse_capture(self, kernel: Kernel) -> None:
        status = self._call("tell whether a stream is captured", "cuStreamIsCapturing", self._stream)
        if status != self._driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            raise BackendError(
                f"{kernel.name} would have to be loaded while a CUDA graph is captured, which ends the capture. Run "
                "the step once before it is captured, or prepare its kernels."
            )

    def _read_limits(self) -> DeviceLimits:
        names = [
            *("MULTIPROCESSOR_COUNT", "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            *("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR"),
        ]
        attributes = [getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}") for name in names]
        device = self._driver.CUdevice(self._device)
        multiprocessors, shared_bytes, major, minor = (
            int(self._call("tell its limits", "cuDeviceGetAttribute", attribute, device)) for attribute in attributes
        )
        return DeviceLimits(multiprocessors, shared_bytes, (major, minor))

    def _call(self, what: str, name: str, *arguments: Any) -> Any:
        return checked(self._driver, what, getattr(self._driver, name)(*arguments))
