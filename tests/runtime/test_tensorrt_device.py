"""The GPU behind CUDA's runtime API, as a double of that API knows it: every error has its own sentence."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

from runtime import BackendError
from runtime.tensorrt.cuda_device import CudaDevice, open_device
from tests.support.toy_bundle import write_toy_bundle

Error = real.cudaError_t
OK = Error.cudaSuccess


class Cuda(ModuleType):
    """A GPU of 1000 bytes. fails: what calls give instead of success. calls: their names, with memory's addresses."""

    def __init__(self, *, count: int = 1, driver: int = 13000, status: Any = OK) -> None:
        super().__init__("runtime")
        self.fails: dict[str, Any] = {}
        self.calls: list[Any] = []
        self.live: dict[int, Any] = {}
        self.count, self.driver, self.status = count, driver, status

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda") or not callable(getattr(real, name)) or name == "cudaError_t":
            return getattr(real, name)
        if isinstance(getattr(real, name), type):
            return getattr(real, name)

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            if name in self.fails:
                return (self.fails[name], None)
            return (OK, *getattr(self, f"_{name}", lambda *_: ())(*arguments))

        return call

    def cudaGetErrorString(self, status: Any) -> Any:
        return OK, f"words for {int(status)}".encode()

    def cudaGetDeviceCount(self) -> Any:
        return self.status, self.count

    def cudaDriverGetVersion(self) -> Any:
        return OK, self.driver

    def cudaRuntimeGetVersion(self) -> Any:
        return OK, 13050

    def _cudaGetDeviceProperties(self, device: int) -> Any:
        return (SimpleNamespace(name=b"GPU of a test\0\0", major=8, minor=9),)

    def _cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return (77,)

    def _cudaMemGetInfo(self) -> Any:
        return 400_000_000, 1_000_000_000

    def _cudaMalloc(self, nbytes: int) -> Any:
        self.live[4096 * (len(self.calls) + 1)] = nbytes
        return (4096 * (len(self.calls) + 1),)

    def _cudaFree(self, address: int) -> Any:
        del self.live[address]
        return ()

    def _cudaHostAlloc(self, nbytes: int, flags: int) -> Any:
        memory = ctypes.create_string_buffer(nbytes)
        self.live[ctypes.addressof(memory)] = memory
        return (ctypes.addressof(memory),)

    def _cudaFreeHost(self, address: int) -> Any:
        del self.live[address]
        return ()

    def _cudaEventCreateWithFlags(self, flags: int) -> Any:
        return (88,)

    def _cudaStreamEndCapture(self, stream: int) -> Any:
        return ("graph",)

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return ("executable",)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


@pytest.fixture
def device(cuda: Cuda) -> CudaDevice:
    made = CudaDevice(cuda)
    cuda.calls.clear()
    return made


def test_what_it_says_of_the_gpu(device: CudaDevice) -> None:
    assert (device.name, device.compute_capability, device.stream) == ("GPU of a test", "8.9", 77)


def test_without_a_gpu_loading_says_so(tmp_path: Path) -> None:
    folder = write_toy_bundle(tmp_path / "toy")
    code = f"from runtime import load; load({str(folder)!r}, backend='tensorrt')"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}  # where there is one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=hidden)
    assert done.returncode
    assert "BackendError: There is no GPU here that CUDA can use" in done.stderr
    assert "load the bundle with another backend, as `onnxruntime`" in done.stderr


@pytest.mark.parametrize(
    "state, words",
    [
        ({"count": None, "driver": 0, "status": Error.cudaErrorInsufficientDriver}, "there is no NVIDIA driver"),
        (
            {"count": None, "driver": 12040, "status": Error.cudaErrorInsufficientDriver},
            r"driver here is made for CUDA 12\.4, and the installed packages for CUDA 13\.5: words for 35",
        ),
        ({"count": None, "status": Error.cudaErrorNoDevice}, r"no GPU here that CUDA can use \(words for 100\)"),
        ({"count": 0}, r"no GPU here that CUDA can use \(it counts none\)"),
    ],
    ids=["no driver", "old driver", "no device", "none"],
)
def test_machines_that_cannot_run_it(monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], words: str) -> None:
    monkeypatch.setattr("cuda.bindings.runtime", Cuda(**state))
    with pytest.raises(BackendError, match=words):
        open_device()


def test_a_gpu_opens(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> None:
    monkeypatch.setattr("cuda.bindings.runtime", cuda)
    assert open_device().name == "GPU of a test"


def test_without_the_package_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        BackendError, match=r'cuda-bindings, which cannot be used here.*`pip install "cierzo\[tensorrt\]"`'
    ):
        open_device()


def test_memory_that_is_not_there_says_how_much_is(device: CudaDevice, cuda: Cuda) -> None:
    cuda.fails["cudaMalloc"] = Error.cudaErrorMemoryAllocation
    words = (
        r"GPU of a test has too little memory for the weights: 2\.50 GB are needed, and 0\.40 of its 1\.00 GB are free"
    )
    with pytest.raises(BackendError, match=words):
        device.allocate(2_500_000_000, "the weights")
    assert "cudaGetLastError" in cuda.names(), "the error would be held against a later call"


def test_memory_is_given_back_once(device: CudaDevice, cuda: Cuda) -> None:
    memory = device.allocate(1000, "a test")
    assert cuda.live == {memory.address: 1024}
    assert memory.nbytes == 1000
    memory.free()
    memory.free()
    assert cuda.live == {}
    device.allocate(1000, "nobody")
    gc.collect()
    assert cuda.live == {}
    assert cuda.names().count("cudaFree") == 2


def test_nothing_is_taken_from_engines_that_live_to_the_end_of_the_process(cuda: Cuda) -> None:
    before = set(weakref.finalize._registry)  # type: ignore[attr-defined]
    device = CudaDevice(cuda)
    held = [device.allocate(8, "a test"), device.pinned(8), device.fence(), device.end_capture()]
    made = set(weakref.finalize._registry) - before  # type: ignore[attr-defined]
    assert len(made) == 1 + len(held)
    assert not any(finalizer.atexit for finalizer in made)


def test_pinned_memory_lives_as_long_as_any_array_on_it(device: CudaDevice, cuda: Cuda) -> None:
    array = device.pinned(100).bytes[8:40].view(np.float32)
    gc.collect()
    array[:] = 7
    assert len(cuda.live) == 1
    del array
    gc.collect()
    assert cuda.live == {}


def test_copies_are_queued_on_the_stream(device: CudaDevice, cuda: Cuda) -> None:
    bytes_ = device.pinned(64).bytes
    cuda.calls.clear()
    device.copy_in(4096, bytes_[16:32])
    device.copy_out(bytes_[:8], 8192)
    device.zero(4096, 12)
    kind, where = real.cudaMemcpyKind, bytes_.ctypes.data
    assert cuda.calls == [
        ("cudaMemcpyAsync", 4096, where + 16, 16, kind.cudaMemcpyHostToDevice, 77),
        ("cudaMemcpyAsync", where, 8192, 8, kind.cudaMemcpyDeviceToHost, 77),
        ("cudaMemsetAsync", 4096, 0, 12, 77),
    ]


def test_a_capture_becomes_a_graph(device: CudaDevice, cuda: Cuda) -> None:
    device.begin_capture()
    graph = device.end_capture()
    graph.launch()
    del graph
    gc.collect()
    assert cuda.calls == [
        ("cudaStreamBeginCapture", 77, real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
        ("cudaStreamEndCapture", 77),
        ("cudaGraphInstantiate", "graph", 0),
        ("cudaGraphDestroy", "graph"),
        ("cudaGraphLaunch", "executable", 77),
        ("cudaGraphExecDestroy", "executable"),
    ]


def test_a_failed_capture_leaves_nothing_behind(device: CudaDevice, cuda: Cuda) -> None:
    cuda.fails["cudaStreamEndCapture"] = Error.cudaErrorStreamCaptureInvalidated
    device.begin_capture()
    with pytest.raises(BackendError, match="could not capture a graph: words for 901"):
        device.end_capture()
    assert cuda.names() == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGetLastError"]
    cuda.fails = {"cudaGraphInstantiate": Error.cudaErrorMemoryAllocation}
    with pytest.raises(BackendError, match="could not prepare a captured graph"):
        device.end_capture()
    assert cuda.names()[-1] == "cudaGraphDestroy"


CALLS: dict[str, Any] = {
    "cudaMalloc": lambda device: device.allocate(1, "a test"),
    "cudaHostAlloc": lambda device: device.pinned(1),
    "cudaMemsetAsync": lambda device: device.zero(0, 1),
    "cudaMemcpyAsync": lambda device: device.copy_in(0, np.zeros(1, np.uint8)),
    "cudaStreamSynchronize": lambda device: device.synchronize(),
    "cudaEventCreateWithFlags": lambda device: device.fence(),
    "cudaEventRecord": lambda device: device.fence(),
    "cudaEventSynchronize": lambda device: device.fence().wait(),
    "cudaStreamBeginCapture": lambda device: device.begin_capture(),
    "cudaGraphLaunch": lambda device: device.end_capture().launch(),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_failure_is_noticed(device: CudaDevice, cuda: Cuda, name: str) -> None:
    CALLS[name](device)
    cuda.fails[name] = Error.cudaErrorIllegalAddress
    with pytest.raises(BackendError, match=r"The GPU could not .*: words for 700 \(cudaErrorIllegalAddress\)"):
        CALLS[name](device)
