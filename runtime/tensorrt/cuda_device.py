"""A GPU through CUDA's runtime API (`cuda.bindings.runtime`)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendError
from runtime.kernels.cuda.device_launcher import DeviceLauncher
from runtime.tensorrt.device import aligned

_WAY_OUT = (
    "Run this on a machine with such a GPU, or load the bundle with another backend, as `onnxruntime`, which runs on "
    "the CPU."
)


def open_device() -> CudaDevice:
    """The first GPU that CUDA shows (CUDA_VISIBLE_DEVICES chooses and orders them).

    Raises BackendError without the Python package, without a driver, with one that is too old, and without a GPU.
    """
    try:
        from cuda.bindings import runtime

        status, count = runtime.cudaGetDeviceCount()
        _, driver = runtime.cudaDriverGetVersion()
        _, wanted = runtime.cudaRuntimeGetVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package finds no library
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackendError(
            f"The GPU is driven through the package cuda-bindings, which cannot be used here ({reason}). Install it "
            'with `pip install "cierzo[tensorrt]"` or `"cierzo[tensorrt-rtx]"`.'
        ) from error
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver and driver:
        raise BackendError(
            f"The NVIDIA driver here is made for CUDA {_version(driver)}, and the installed packages for CUDA "
            f"{_version(wanted)}: {_text(runtime, status)}. Update the driver, or install older packages."
        )
    if status != runtime.cudaError_t.cudaSuccess or not count:
        said = _text(runtime, status) if status != runtime.cudaError_t.cudaSuccess else "it counts none"
        found = said if driver else "there is no NVIDIA driver"
        raise BackendError(f"There is no GPU here that CUDA can use ({found}), and this backend needs one. {_WAY_OUT}")
    return CudaDevice(runtime)


def _at_its_end(owner: object, give_back: Callable[..., Any], *held: Any) -> weakref.finalize[..., object]:
    """Call `give_back(*held)` when `owner` goes, but not at the process's end: CUDA gives back everything there, and
    engines that live until then, and may be torn down later than this, must not lose their stream and memory before."""
    made = weakref.finalize(owner, give_back, *held)
    made.atexit = False
    return made


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(runtime: Any, status: Any) -> str:
    _, text = runtime.cudaGetErrorString(status)
    return text.decode(errors="replace") if text else "no description"


class CudaDevice:
    """GPU 0 as a Device (see device.py). runtime: the module `cuda.bindings.runtime`."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._call("be used", "cudaSetDevice", 0)
        properties = self._call("tell its properties", "cudaGetDeviceProperties", 0)
        name = properties.name
        self._name = name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name)
        self._compute_capability = f"{properties.major}.{properties.minor}"
        # Not the default stream: work on that one waits for all others, and cannot be captured.
        self._stream = self._call("make a stream", "cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self._launcher: DeviceLauncher | None = None
        _at_its_end(self, runtime.cudaStreamDestroy, self._stream)

    @property
    def name(self) -> str:
        return self._name

    @property
    def compute_capability(self) -> str:
        return self._compute_capability

    @property
    def stream(self) -> int:
        return int(self._stream)

    @property
    def launcher(self) -> DeviceLauncher:
        if self._launcher is None:
            self._launcher = DeviceLauncher(self.stream)
        return self._launcher

    def allocate(self, nbytes: int, what: str) -> CudaMemory:
        runtime = self._runtime
        status, address = runtime.cudaMalloc(aligned(max(nbytes, 1)))
        if status == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()  # otherwise some later call would be blamed
            free, total = self._call("tell its free memory", "cudaMemGetInfo")
            raise BackendError(
                f"The GPU {self.name} has too little memory for {what}: {nbytes / 1e9:.2f} GB are needed, and "
                f"{free / 1e9:.2f} of its {total / 1e9:.2f} GB are free. Close what else runs on it, feed fewer rows "
                "at once, or export with fewer bits a weight, a smaller chunk or a smaller context and build again."
            )
        self._check(f"give memory for {what}", status)
        return CudaMemory(runtime, int(address), nbytes)

    def pinned(self, nbytes: int) -> CudaPinned:
        what = f"pin {nbytes / 1e6:.1f} MB of the host's memory"
        address = self._call(what, "cudaHostAlloc", max(nbytes, 1), self._runtime.cudaHostAllocDefault)
        return CudaPinned(self._runtime, int(address), nbytes)

    def zero(self, address: int, nbytes: int) -> None:
        self._call("write zeros", "cudaMemsetAsync", address, 0, nbytes, self._stream)

    def copy_in(self, address: int, source: NDArray[np.uint8]) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        where = source.ctypes.data
        self._call("copy from the host", "cudaMemcpyAsync", address, where, source.nbytes, kind, self._stream)

    def copy_out(self, target: NDArray[np.uint8], address: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        where = target.ctypes.data
        self._call("copy to the host", "cudaMemcpyAsync", where, address, target.nbytes, kind, self._stream)

    def fence(self) -> CudaFence:
        event = self._call("make an event", "cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)
        fence = CudaFence(self, self._runtime, event)
        self._call("record an event", "cudaEventRecord", event, self._stream)
        return fence

    def synchronize(self) -> None:
        self._call("finish what was queued", "cudaStreamSynchronize", self._stream)

    def begin_capture(self) -> None:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("begin to capture a graph", "cudaStreamBeginCapture", self._stream, mode)

    def end_capture(self) -> CudaGraph:
        runtime = self._runtime
        status, graph = runtime.cudaStreamEndCapture(self._stream)
        if status != runtime.cudaError_t.cudaSuccess:
            runtime.cudaGetLastError()  # a failed capture is not held against what follows
        self._check("capture a graph", status)
        try:
            executable = self._call("prepare a captured graph", "cudaGraphInstantiate", graph, 0)
        finally:
            runtime.cudaGraphDestroy(graph)
        return CudaGraph(self, runtime, executable, self._stream)

    def _call(self, what: str, name: str, *arguments: Any) -> Any:
        """What a call gives besides its status: nothing, one value, or a tuple."""
        status, *values = getattr(self._runtime, name)(*arguments)
        self._check(what, status)
        return values[0] if len(values) == 1 else tuple(values) or None

    def _check(self, what: str, status: Any) -> None:
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise BackendError(
                f"The GPU could not {what}: {_text(self._runtime, status)} ({getattr(status, 'name', status)}). If it "
                "happens again, run with CUDA_LAUNCH_BLOCKING=1 to see where, and report it."
            )


class CudaMemory:
    """See DeviceMemory."""

    def __init__(self, runtime: Any, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self._free = _at_its_end(self, runtime.cudaFree, address)  # which waits for what is queued

    def free(self) -> None:
        self._free()


class CudaPinned:
    """See PinnedMemory."""

    def __init__(self, runtime: Any, address: int, nbytes: int) -> None:
        raw = (ctypes.c_uint8 * nbytes).from_address(address)
        _at_its_end(raw, runtime.cudaFreeHost, address)  # arrays hold what they were made of
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(raw)


class CudaFence:
    """See Fence."""

    def __init__(self, device: CudaDevice, runtime: Any, event: Any) -> None:
        self._device, self._event = device, event
        _at_its_end(self, runtime.cudaEventDestroy, event)

    def wait(self) -> None:
        self._device._call("finish what was queued", "cudaEventSynchronize", self._event)


class CudaGraph:
    """See Graph."""

    def __init__(self, device: CudaDevice, runtime: Any, executable: Any, stream: Any) -> None:
        self._device, self._executable, self._stream = device, executable, stream
        _at_its_end(self, runtime.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        self._device._call("launch a captured graph", "cudaGraphLaunch", self._executable, self._stream)
