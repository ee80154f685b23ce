"""The GPU's memory, by the CUDA runtime that ONNX Runtime's provider has loaded.

ONNX Runtime's own allocator would keep what is given back, and takes the next power of two where it grows: weights and
rings are gigabytes, and whoever asks for more rows must get those of fewer rows back first.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from runtime.errors import BackendError
from runtime.onnxruntime_cuda.place import Block, Bytes

_TO_DEVICE, _TO_HOST = 1, 2
_OUT_OF_MEMORY = 2
_MAJOR, _MINOR = 75, 76
"""cudaMemcpyKind, cudaError and cudaDeviceAttr, as the CUDA runtime's documentation numbers them."""

_DEFAULT_STREAM = None


class CudaRuntime:
    """The calls of the CUDA runtime that are used here, on GPU 0.

    library: a loaded library that the runtime can be reached through, such as the provider's. Raises BackendError where
    it has no such calls.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        signatures = {
            "cudaMalloc": (ctypes.POINTER(pointer), size),
            "cudaFree": (pointer,),
            "cudaHostAlloc": (ctypes.POINTER(pointer), size, ctypes.c_uint),
            "cudaFreeHost": (pointer,),
            "cudaMemcpy": (pointer, pointer, size, ctypes.c_int),
            "cudaMemset": (pointer, ctypes.c_int, size),
            "cudaMemGetInfo": (ctypes.POINTER(size), ctypes.POINTER(size)),
            "cudaStreamSynchronize": (pointer,),
            "cudaGetDeviceCount": (ctypes.POINTER(ctypes.c_int),),
            "cudaDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
        }
        try:
            for name, arguments in signatures.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, ctypes.c_int
            library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = (ctypes.c_int,), ctypes.c_char_p
            library.cudaGetLastError.argtypes, library.cudaGetLastError.restype = (), ctypes.c_int
        except AttributeError as error:
            raise BackendError(
                f"ONNX Runtime's CUDA provider does not lead to the CUDA runtime that it was built with ({error}). "
                "Install it and NVIDIA's libraries anew: `pip install 'onnxruntime-gpu[cuda]' nvidia-cublas`."
            ) from error

    def code(self, name: str, *arguments: object) -> int:
        """Call it; 0 where it succeeded. An error is taken off the list, or the next caller would be told it."""
        code = int(getattr(self._library, name)(*arguments))
        if code:
            self._library.cudaGetLastError()
        return code

    def call(self, name: str, *arguments: object) -> None:
        """Call it. Raises BackendError where it fails."""
        if code := self.code(name, *arguments):
            raise BackendError(
                f"CUDA reports {self.text(code)!r} ({name}, error {code}). Look with `nvidia-smi` whether the GPU "
                "works, and start the process again."
            )

    def text(self, code: int) -> str:
        """What an error number means."""
        said = self._library.cudaGetErrorString(code)
        return "" if said is None else bytes(said).decode(errors="replace")

    def devices(self) -> tuple[int, str]:
        """How many GPUs there are, and why none, if there is a reason."""
        count = ctypes.c_int(0)
        code = self.code("cudaGetDeviceCount", ctypes.byref(count))
        return (0, self.text(code)) if code else (count.value, "")

    def compute_capability(self) -> tuple[int, int]:
        """Of GPU 0, as (8, 9)."""
        found = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int(0)
            self.call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            found.append(value.value)
        return found[0], found[1]


class CudaBlock:
    """See Block."""

    def __init__(self, runtime: CudaRuntime, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self._given_back = weakref.finalize(self, runtime.code, "cudaFree", address)
        self._given_back.atexit = False  # the driver does, and the provider may be gone by then

    def free(self) -> None:
        """See Block.free."""
        self._given_back()


class CudaMemory:
    """See Memory."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime

    def allocate(self, nbytes: int, what: str) -> CudaBlock:
        """See Memory.allocate."""
        found = ctypes.c_void_p()
        code = self._runtime.code("cudaMalloc", ctypes.byref(found), max(nbytes, 1))
        if code == _OUT_OF_MEMORY:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            self._runtime.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
            raise BackendError(
                f"The GPU's memory does not suffice: {what} take {nbytes / 1e9:.2f} GB, and of its "
                f"{total.value / 1e9:.2f} GB {free.value / 1e9:.2f} GB are free. Free some, use fewer rows or a "
                "shorter context, or quantise the weights (`cierzo export --weights int4`)."
            )
        if code:
            raise BackendError(
                f"CUDA reports {self._runtime.text(code)!r} (error {code}) where {nbytes / 1e9:.2f} GB were asked for: "
                f"{what}. Look with `nvidia-smi` whether the GPU works, and start the process again."
            )
        return CudaBlock(self._runtime, int(found.value or 0), nbytes)

    def staging(self, nbytes: int) -> Bytes:
        """See Memory.staging."""
        found = ctypes.c_void_p()
        self._runtime.call("cudaHostAlloc", ctypes.byref(found), max(nbytes, 1), 0)
        address = int(found.value or 0)
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(memory, self._runtime.code, "cudaFreeHost", address).atexit = False
        return np.ctypeslib.as_array(memory)

    def zero(self, block: Block) -> None:
        """See Memory.zero."""
        self._runtime.call("cudaMemset", block.address, 0, block.nbytes)
        self._runtime.call("cudaStreamSynchronize", _DEFAULT_STREAM)

    def write(self, address: int, source: Bytes) -> None:
        """See Memory.write."""
        self._runtime.call("cudaMemcpy", address, source.ctypes.data, source.nbytes, _TO_DEVICE)
        # A small copy out of memory that is not pinned may still be under way, and ONNX Runtime's streams would not
        # wait for it.
        self._runtime.call("cudaStreamSynchronize", _DEFAULT_STREAM)

    def read(self, target: Bytes, address: int) -> None:
        """See Memory.read."""
        self._runtime.call("cudaMemcpy", target.ctypes.data, address, target.nbytes, _TO_HOST)
