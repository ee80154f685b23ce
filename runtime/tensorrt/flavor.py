"""The two libraries that build and run TensorRT engines, and all that differs between them.

TensorRT runs on every GPU of today and builds on the GPU itself. TensorRT-RTX runs on fewer, and builds for a named
compute capability on any machine, with or without a GPU; it compiles its kernels when an engine is loaded, and keeps
them in a runtime cache. Nothing outside this module knows which of the two is loaded.

Compute capabilities are spelled as "8.9" throughout.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

from runtime.errors import BackendError
from runtime.tensorrt.alias import load_alias


@dataclass(frozen=True, slots=True)
class _Library:
    """What is known of a flavour before it is loaded. extra: of Cierzo's package, which installs it.

    runs_on: the GPUs that it supports. builds_for: those that it builds for wherever it is, or None where it builds
    for the GPU at hand only. alias: a name that it looks for, and the loaded library that is meant.
    """

    module: str
    extra: str
    versions: tuple[int, int]
    runs_on: tuple[str, ...]
    builds_for: tuple[str, ...] | None
    alias: tuple[str, str] | None
    environment: Mapping[str, str]


_LIBRARIES: Mapping[str, _Library] = MappingProxyType(
    {
        "tensorrt": _Library(
            module="tensorrt",
            extra="tensorrt",
            versions=(11, 12),
            runs_on=("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"),
            builds_for=None,
            alias=None,
            environment=MappingProxyType({"POLYGRAPHY_USE_TENSORRT_RTX": "0"}),
        ),
        "tensorrt-rtx": _Library(
            module="tensorrt_rtx",
            extra="tensorrt-rtx",
            versions=(1, 2),
            runs_on=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
            builds_for=("8.0", "8.6", "8.9", "12.0"),
            alias=("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"),
            environment=MappingProxyType({"POLYGRAPHY_USE_TENSORRT_RTX": "1"}),
        ),
    }
)

FLAVORS: tuple[str, ...] = tuple(_LIBRARIES)
"""Names of the flavours; where none is asked for, the first one that is installed serves."""

FLAVORS_FOR_OTHER_GPUS: tuple[str, ...] = tuple(name for name, lib in _LIBRARIES.items() if lib.builds_for is not None)
"""Those that build for a GPU which is not there."""


@dataclass(frozen=True, slots=True)
class Flavor:
    """A loaded flavour. trt: its Python module. version: the library's, as "1.7.1.116".

    builds_for: the compute capabilities that it builds for without such a GPU; None if only for the GPU at hand.
    runs_on_all: those that the library supports at all. environment: variables that point Polygraphy at this flavour,
    to be set before it is imported.
    """

    name: str
    trt: ModuleType
    version: str
    builds_for: tuple[str, ...] | None
    runs_on_all: tuple[str, ...]
    environment: Mapping[str, str]

    def runs_on(self, compute_capability: str) -> bool:
        """Whether this library runs engines on such a GPU."""
        return compute_capability in self.runs_on_all

    def set_compute_capability(self, config: Any, compute_capability: str) -> None:
        """Let an IBuilderConfig build for `compute_capability`, one of `builds_for`; else for the GPU at hand.

        Without a target TensorRT-RTX would build portable code that repeats keys and values in memory.
        """
        if self.builds_for is None:
            return
        config.num_compute_capabilities = 1
        target = getattr(self.trt.ComputeCapability, "SM" + compute_capability.replace(".", ""))
        if not config.set_compute_capability(target, 0):
            raise BackendError(
                f"{self.name} {self.version} does not build for compute capability {compute_capability}. "
                f"It builds for {', '.join(self.builds_for)}."
            )

    def build_flags(self) -> tuple[Any, ...]:
        """BuilderFlags that every engine of this flavour is built with.

        REQUIRE_USER_ALLOCATION, where there is such a flag: nothing is allocated while an engine runs, so that a step
        can always be captured in a CUDA graph.
        """
        flag = getattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        return () if flag is None else (flag,)

    def use_timings(self, config: Any, timings: bytes | None) -> None:
        """Let an IBuilderConfig begin with what `timings` gave after an earlier build, or None.

        For a library that times kernels on the GPU while it builds; one that does not takes nothing.
        """
        if self.builds_for is None:
            config.set_timing_cache(config.create_timing_cache(timings or b""), ignore_mismatch=False)

    def timings(self, config: Any) -> bytes | None:
        """What the library timed in a build with this configuration; None from one that does not."""
        cache = config.get_timing_cache() if self.builds_for is None else None
        return None if cache is None else bytes(cache.serialize())

    def open_context(self, engine: Any, cache: bytes | None) -> OpenContext:
        """An execution context of an ICudaEngine; the caller allocates device memory for activations (USER_MANAGED).

        cache: what `OpenContext.cache_bytes` gave for this engine and GPU before, or None. One that does not fit is
        ignored. Steps are captured in CUDA graphs by the caller, never by the library. Raises BackendError if the
        library makes no context.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self.trt, "IRuntimeCache"):
            context, runtime_cache = engine.create_execution_context(strategy), None
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED
            kernels = self.trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
            runtime_cache = config.create_runtime_cache()
            if cache is not None:
                runtime_cache.deserialize(cache)
            config.set_runtime_cache(runtime_cache)
            context = engine.create_execution_context(config)
        if context is None:
            raise BackendError(
                f"{self.name} {self.version} makes no execution context of the engine: most likely the GPU's memory "
                "is too small for it, or its driver too old. The library's log says more."
            )
        return OpenContext(context, runtime_cache)


@dataclass(frozen=True, slots=True)
class OpenContext:
    """An IExecutionContext, and the cache of the kernels that were compiled for it (None where there is none)."""

    context: Any
    runtime_cache: Any

    def cache_bytes(self) -> bytes | None:
        """The kernels compiled so far, to be given to `Flavor.open_context` next time; None where nothing is kept."""
        if self.runtime_cache is None:
            return None
        blob = self.runtime_cache.serialize()
        return None if blob is None else bytes(blob)


def load_flavor(name: str | None = None) -> Flavor:
    """Import a flavour by its name in FLAVORS; None: the first one that is installed.

    Raises BackendError for an unknown name, for a library that is not installed (with the extra to install), that does
    not load, or whose version is outside the range that Cierzo is written for.
    """
    if name is not None:
        if name not in _LIBRARIES:
            raise BackendError(f"There is no TensorRT flavour {name!r}. Available: {', '.join(FLAVORS)}.")
        return _load(name)
    for candidate in FLAVORS:
        if importlib.util.find_spec(_LIBRARIES[candidate].module) is not None:
            return _load(candidate)
    ways = " or ".join(f'`pip install "cierzo[{library.extra}]"`' for library in _LIBRARIES.values())
    raise BackendError(
        f"Neither {' nor '.join(FLAVORS)} is installed, and one of them builds and runs TensorRT engines. "
        f"Install the one that supports the GPU: {ways}."
    )


def supported_gpus(name: str) -> tuple[str, ...]:
    """The compute capabilities that the flavour `name` runs on, known without loading it."""
    return _LIBRARIES[name].runs_on


@cache
def _load(name: str) -> Flavor:
    library = _LIBRARIES[name]
    try:
        trt = importlib.import_module(library.module)
        if library.alias is not None:
            load_alias(*library.alias)
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == library.module
        found = "is not installed" if missing else f"is installed, but does not load ({error})"
        raise BackendError(f'{name} {found}. Install it with `pip install "cierzo[{library.extra}]"`.') from error
    version = str(trt.__version__)
    low, below = library.versions
    if not version.split(".")[0].isdigit() or not low <= int(version.split(".")[0]) < below:
        raise BackendError(
            f"{name} {version} is installed, but Cierzo is written for versions from {low} to below {below}. "
            f'Install one with `pip install "cierzo[{library.extra}]"`.'
        )
    return Flavor(name, trt, version, library.builds_for, library.runs_on, library.environment)
