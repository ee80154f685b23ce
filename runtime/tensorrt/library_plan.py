"""Plans of the library: an ICudaEngine as a Plan, its execution contexts and its refitter."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from runtime.engine_info import EngineInfo
from runtime.errors import BackendError
from runtime.json_files import brief
from runtime.tensorrt.device import Device
from runtime.tensorrt.engine_choice import BuiltEngine
from runtime.tensorrt.flavor import Flavor
from runtime.tensorrt.kept import kept_file, read_kept, write_kept
from runtime.tensorrt.plans import PlanTensor

_TYPES = {
    "FLOAT": "F32", "HALF": "F16", "BF16": "BF16", "FP8": "F8_E4M3", "INT4": "I4", "INT8": "I8", "UINT8": "U8",
    "INT32": "I32", "INT64": "I64", "BOOL": "BOOL",
}  # fmt: skip
"""The library's names of types, and those of safetensors."""


class Library:
    """A flavour with what loading an engine with it needs: its log, its runtime, and the plugins of the engine.

    Raises BackendError for an engine with plugins that this Cierzo does not have.
    """

    def __init__(self, built: BuiltEngine, device: Device) -> None:
        self.flavor: Flavor = built.flavor
        self.device = device
        self._lines: deque[str] = deque(maxlen=6)
        self.log = _log(built.flavor.trt, self._lines.append)
        self._plugins = _register(built.flavor, built.info)
        if self._plugins is not None:
            # Not at the process's end, which engines may outlive.
            weakref.finalize(self, _deregister, self._plugins).atexit = False
        self._runtime = built.flavor.trt.Runtime(self.log)

    def load(self, path: Path, sha256: str) -> LibraryPlan:
        """Deserialise a plan with that hash. Raises BackendError with what the library said where it cannot."""
        content = np.memmap(path, np.uint8, mode="r")
        engine = self.checked(f"load {path}", lambda: self._runtime.deserialize_cuda_engine(content))
        return LibraryPlan(self, engine, sha256)

    def checked(self, what: str, call: Callable[[], Any]) -> Any:
        """What a call of the library gives, unless it fails: raises, or gives None or False."""
        self._lines.clear()
        try:
            made = call()
        except Exception as error:  # the library's bindings raise whatever they like
            self._raise_failure_of_plugins()
            raise self._failure(what, str(error)) from error
        self._raise_failure_of_plugins()
        if made is None or made is False:
            raise self._failure(what)
        return made

    def _raise_failure_of_plugins(self) -> None:
        if self._plugins is not None:
            self._plugins.raise_failure()

    def _failure(self, what: str, *more: str) -> BackendError:
        said = " ".join([*self._lines, *more]).strip() or "it does not say why"
        return BackendError(f"{self.flavor.name} {self.flavor.version} could not {what}: {said}")


def _log(trt: Any, keep: Callable[[str], None]) -> Any:
    """A logger that keeps errors, which go into the exceptions that follow, and drops all else."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                keep(" ".join(message.split()))

    return Log()


def _register(flavor: Flavor, info: EngineInfo) -> Any:
    """The plugins of an engine, registered; None for an engine without."""
    if not info.plugins:
        return None
    from runtime.tensorrt_plugins import OPERATIONS, register

    unknown = [name for name in info.plugins if name not in OPERATIONS]
    if unknown:
        raise BackendError(
            f"The engine {info.name} needs the plugin {brief(unknown[0])[1:-1]}, and this Cierzo has only "
            f"{', '.join(OPERATIONS)}. Build the engine again with this version of Cierzo."
        )
    return register(flavor, info.plugins)


def _deregister(registration: Any) -> None:
    from runtime.tensorrt_plugins import deregister

    deregister(registration)


class LibraryPlan:
    """See Plan. sha256: of its file, by which what is cached for it is found."""

    def __init__(self, library: Library, engine: Any, sha256: str) -> None:
        # In this order they go as well: an engine needs its stream and its plugins to the last.
        self._engine, self._library = engine, library
        self._cache = kept_file("engines", f"{sha256[:32]}-{library.flavor.version}")
        mode = library.flavor.trt.TensorIOMode
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.tensors: Mapping[str, PlanTensor] = MappingProxyType(
            {
                name: PlanTensor(
                    dtype=_spelled(engine.get_tensor_dtype(name)),
                    shape=tuple(engine.get_tensor_shape(name)),
                    is_input=engine.get_tensor_mode(name) == mode.INPUT,
                    on_device=engine.get_tensor_location(name) == library.flavor.trt.TensorLocation.DEVICE,
                    is_linear=engine.get_tensor_format(name) == library.flavor.trt.TensorFormat.LINEAR,
                )
                for name in names
            }
        )

    @property
    def profiles(self) -> int:
        return int(self._engine.num_optimization_profiles)

    def scratch_bytes(self, profile: int) -> int:
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def open(self, profile: int, scratch: int, nbytes: int) -> LibraryContext:
        library, file = self._library, self._cache
        cached = read_kept(file)
        opened = library.checked("open an engine", lambda: library.flavor.open_context(self._engine, cached))
        context, stream = opened.context, library.device.stream
        library.checked(f"take profile {profile}", lambda: context.set_optimization_profile_async(profile, stream))
        library.device.synchronize()  # the profile may be switched by a copy
        context.set_device_memory(scratch, nbytes)

        def keep() -> None:
            nonlocal cached
            made = opened.cache_bytes()
            if made is not None and made != cached:
                write_kept(file, made)
                cached = made

        return LibraryContext(library, context, keep)

    def refitter(self) -> LibraryRefitter:
        library = self._library
        made = library.checked("refit a plan", lambda: library.flavor.trt.Refitter(self._engine, library.log))
        return LibraryRefitter(library, made)


class LibraryContext:
    """See Context. keep: writes down what was compiled for it, called when it has run with shapes that are new."""

    def __init__(self, library: Library, context: Any, keep: Callable[[], None]) -> None:
        self._keep = keep
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._told = True
        self._ran: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
        self._context, self._library = context, library  # they go in this order

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        what = f"take {name} with the shape {list(shape)}"
        self._library.checked(what, lambda: self._context.set_input_shape(name, tuple(shape)))
        self._shapes[name], self._told = tuple(shape), True

    def set_address(self, name: str, address: int) -> None:
        self._library.checked(f"take an address for {name}", lambda: self._context.set_tensor_address(name, address))

    def enqueue(self) -> None:
        self._library.checked("run a step", lambda: self._context.execute_async_v3(self._library.device.stream))
        if not self._told:
            return
        self._told, shapes = False, tuple(sorted(self._shapes.items()))
        if shapes not in self._ran:
            self._ran.add(shapes)
            self._keep()


class LibraryRefitter:
    """See Refitter."""

    def __init__(self, library: Library, refitter: Any) -> None:
        self._refitter, self._library = refitter, library  # they go in this order

    def prototype(self, name: str) -> tuple[str, int] | None:
        found = self._refitter.get_weights_prototype(name)
        return None if found.size < 0 else (_spelled(found.dtype), int(found.size))

    def set(self, name: str, dtype: str, count: int, address: int) -> bool:
        trt = self._library.flavor.trt
        theirs = next(ours for ours, spelled in _TYPES.items() if spelled == dtype)
        return bool(self._refitter.set_named_weights(name, trt.Weights(getattr(trt.DataType, theirs), address, count)))

    def missing(self) -> Sequence[str]:
        return list(self._refitter.get_missing_weights())

    def refit(self) -> bool:
        return bool(self._library.checked("fill weights into a plan", self._refitter.refit_cuda_engine))


def _spelled(dtype: Any) -> str:
    return _TYPES.get(dtype.name, str(dtype.name))
