"""Whether ONNX Runtime can run on a GPU here. Where it cannot, it would log to stderr and run on the CPU instead; here
that is one BackendError that says what is missing.

onnxruntime and onnxruntime-gpu are the same Python package, so nothing but what it offers tells which one is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.errors import BackendError
from runtime.onnxruntime_cuda.cuda_memory import CudaMemory, CudaRuntime
from runtime.onnxruntime_cuda.place import Place

PROVIDER = "CUDAExecutionProvider"
PACKAGE = "onnxruntime-gpu==1.31.*"
"""What engines are built for; one of another minor version would refuse them."""

LEAST_COMPUTE_CAPABILITY = (8, 0)
"""What FlashAttention and bfloat16 take."""

_LOGS_NOTHING, _LOGS_ERRORS = 4, 3
"""Severities of ONNX Runtime's default logger. It begins with warnings; those are of no use to whoever runs a model:
its kernels for mixtures of experts give one for every variant that they tried and that was none."""

_LIBRARIES = ("libcudart.so.{major}", "libcublasLt.so.{major}", "libcublas.so.{major}", "libcurand.so.10")
"""What the provider is linked to, each behind those that it needs itself."""

_SHARED, _CUDA = "libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"
_OTHER_BACKEND = "or load the bundle with backend='onnxruntime', which runs on the CPU"


def open_cuda() -> Place:
    """GPU 0 of this machine.

    Raises BackendError where the installed ONNX Runtime has no CUDA provider, where libraries of CUDA or the driver are
    missing, where there is no GPU, and for one that is too old.
    """
    if PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"The installed ONNX Runtime {ort.__version__} is the build for the CPU. Install the one for CUDA with "
            "`pip install 'cierzo[cuda]'`, and then, since the packages onnxruntime and onnxruntime-gpu unpack into "
            "the same folder, `pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps "
            f"'{PACKAGE}'`; {_OTHER_BACKEND}."
        )
    with silent():
        _preload()
        library = _loaded_provider()
    runtime = CudaRuntime(library)
    count, why = runtime.devices()
    if not count:
        raise BackendError(
            f"This machine has no GPU that CUDA can use ({why or 'it finds none'}). Look with `nvidia-smi` for the GPU "
            f"and its driver, {_OTHER_BACKEND}."
        )
    found = runtime.compute_capability()
    if found < LEAST_COMPUTE_CAPABILITY:
        raise BackendError(
            f"This machine's GPU has the compute capability {found[0]}.{found[1]}, and ONNX Runtime's attention takes "
            f"one of {LEAST_COMPUTE_CAPABILITY[0]}.{LEAST_COMPUTE_CAPABILITY[1]} or more (Ampere). Use another GPU, "
            f"{_OTHER_BACKEND}."
        )
    return Place(
        "cuda",
        PROVIDER,
        f"an NVIDIA GPU of compute capability {found[0]}.{found[1]}",
        CudaMemory(runtime),
        # TensorFloat-32 would round float32 factors to 10 bits. An arena that doubles would hold memory for nothing.
        {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
        {"enable_cuda_graph": "1"},
        {"session.disable_cpu_ep_fallback": "1"},
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What ONNX Runtime prints and logs outside of a session is dropped: all that matters is raised as well.

    Side effect: afterwards it logs errors only.
    """
    ort.set_default_logger_severity(_LOGS_NOTHING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(_LOGS_ERRORS)


def _preload() -> None:
    """Load CUDA's libraries out of NVIDIA's Python packages, where those are installed.

    ONNX Runtime looks for them beside its own folder; where that is one of its own, they lie in another of sys.path.
    What neither finds may still be found by the system's loader, which is asked next.
    """
    preload = getattr(ort, "preload_dlls", None)
    if preload is not None:
        with contextlib.suppress(OSError, RuntimeError):
            preload()
    major = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    for library in _LIBRARIES:
        name = library.format(major=major)
        if not _loads(name):
            files = (file for folder in sys.path for file in sorted(Path(folder).glob(f"nvidia/*/lib/{name}")))
            next((file for file in files if _loads(str(file))), None)


def _loads(library: str) -> bool:
    """Load it, by a name that was loaded before, one that the system's loader finds, or a path."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _loaded_provider() -> ctypes.CDLL:
    """The provider's library, loaded by ONNX Runtime. Raises BackendError, naming what is missing, where it cannot."""
    folder = Path(ort.__file__).parent / "capi"
    try:
        # The first thing that needs it loads it. To load it before ONNX Runtime does would leave it half set up.
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", 0)
    except Exception as failure:  # ONNX Runtime's exceptions share no base below Exception
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(folder / _SHARED), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
        try:
            return ctypes.CDLL(str(folder / _CUDA))
        except OSError as error:
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot load its CUDA provider ({error}). Install NVIDIA's libraries "
                f"with `pip install 'onnxruntime-gpu[cuda]' nvidia-cublas`, or put their folder into LD_LIBRARY_PATH; "
                f"{_OTHER_BACKEND}."
            ) from failure
    return ctypes.CDLL(str(folder / _CUDA))
