"""TensorRT's Python module, as far as loading and running engines uses it; its engines are `PlanDouble`s.

A plan is an ONNX file: what is deserialised is run by ONNX Runtime on the memory of a `HostDevice`.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

from runtime.engine_info import PlanProfile
from runtime.tensorrt.flavor import Flavor
from tests.support.gpu_double import HostDevice
from tests.support.plan_double import ContextDouble, PlanDouble, RefitterDouble

TYPES = {"F32": "FLOAT", "F16": "HALF", "BF16": "BF16", "I64": "INT64", "I8": "INT8", "I4": "INT4"}


def _enumeration(name: str, members: Sequence[str]) -> Any:
    return enum.Enum(name, list(members))


class Logger:
    Severity = _enumeration("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


class Weights:
    def __init__(self, dtype: Any, address: int, count: int) -> None:
        self.dtype, self.numpy, self.size = dtype, address, count


class Library(SimpleNamespace):
    """The module. profiles: of the plans, loaded in the order "prefill", "decode". refittable: see PlanDouble.

    says: errors that the next call logs, for which it then fails. when_running: the same for the next step.

    caches: whether it is the flavour that keeps what it compiled.
    """

    def __init__(
        self,
        device: HostDevice,
        profiles: Mapping[str, Sequence[PlanProfile]],
        *,
        refittable: Sequence[str] = (),
        caches: bool = False,
    ) -> None:
        super().__init__()
        library = self
        self.refittable, self.engines = refittable, list[Any]()
        self.device, self.profiles, self.says, self.given_caches = device, profiles, list[str](), list[Any]()
        self.when_running = list[str]()
        self.compiled = b"compiled"
        self.ILogger, self.Weights = Logger, Weights
        self.TensorIOMode = _enumeration("TensorIOMode", ["INPUT", "OUTPUT"])
        self.TensorFormat = _enumeration("TensorFormat", ["LINEAR", "CHW32"])
        self.TensorLocation = _enumeration("TensorLocation", ["DEVICE", "HOST"])
        self.DataType = _enumeration("DataType", sorted(TYPES.values()))
        self.ExecutionContextAllocationStrategy = _enumeration("Strategy", ["USER_MANAGED"])
        self.Runtime = lambda log: SimpleNamespace(
            deserialize_cuda_engine=lambda content: None if library.fails(log) else Engine(library, bytes(content), log)
        )
        self.Refitter = Refitter
        if caches:
            self.IRuntimeCache = object
            self.CudaGraphStrategy = _enumeration("CudaGraphStrategy", ["DISABLED"])
            self.DynamicShapesKernelSpecializationStrategy = _enumeration("Kernels", ["EAGER", "LAZY", "NONE"])

    def fails(self, log: Any) -> bool:
        """Log what is to be said; whether there was anything."""
        said, self.says = self.says, []
        for line in said:
            log.log(Logger.Severity.ERROR, line)
            log.log(Logger.Severity.WARNING, "something of no interest")
        return bool(said)

    def flavor(self, name: str = "tensorrt", version: str = "11.0.0") -> Flavor:
        """The flavour that has this library loaded."""
        return Flavor(name, self, version, None, ("8.9",), MappingProxyType({}))  # type: ignore[arg-type]


class Engine:
    """An ICudaEngine."""

    def __init__(self, library: Library, model: bytes, log: Any) -> None:
        kind = ("prefill", "decode")[len(library.engines) % 2]
        library.engines.append(self)
        self.library, self.log = library, log
        self.plan = PlanDouble(library.device, kind, model, library.profiles[kind], library.refittable)
        self.names = list(self.plan.tensors)
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), self.plan.profiles
        self.on_host: set[str] = set()
        self.packed: set[str] = set()

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.library.DataType[TYPES[self.plan.tensors[name].dtype]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.plan.tensors[name].shape)

    def get_tensor_mode(self, name: str) -> Any:
        mode = self.library.TensorIOMode
        return mode.INPUT if self.plan.tensors[name].is_input else mode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.library.TensorLocation.HOST if name in self.on_host else self.library.TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> Any:
        return self.library.TensorFormat.CHW32 if name in self.packed else self.library.TensorFormat.LINEAR

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.plan.scratch_bytes(profile)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.library)

    def create_execution_context(self, how: Any) -> ExecutionContext | None:
        if isinstance(how, RuntimeConfig):
            assert how.cuda_graph_strategy == self.library.CudaGraphStrategy.DISABLED
            how = how.strategy
        assert how == self.library.ExecutionContextAllocationStrategy.USER_MANAGED
        return None if self.library.fails(self.log) else ExecutionContext(self)


class RuntimeConfig:
    """An IRuntimeConfig, and the IRuntimeCache that it makes."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeConfig:
        return self

    def set_runtime_cache(self, cache: Any) -> bool:
        return True

    def deserialize(self, content: bytes) -> bool:
        self.library.given_caches.append(content)
        return True

    def serialize(self) -> bytes:
        return self.library.compiled


class ExecutionContext:
    """An IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile = 0
        self.context: ContextDouble | None = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self.engine.library.device.stream
        self.profile = profile
        return not self.engine.library.fails(self.engine.log)

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.context = self.engine.plan.open(self.profile, address, nbytes)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.context is not None, "the scratch memory comes first"
        self.context.set_shape(name, shape)
        return not self.engine.library.fails(self.engine.log)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert self.context is not None, "the scratch memory comes first"
        self.context.set_address(name, address)
        return not self.engine.library.fails(self.engine.log)

    def execute_async_v3(self, stream: int) -> bool:
        assert self.context is not None
        assert stream == self.engine.library.device.stream
        library = self.engine.library
        library.says, library.when_running = library.when_running, []
        if library.fails(self.engine.log):
            return False
        self.context.enqueue()
        return True


class Refitter:
    """A trt.Refitter."""

    def __init__(self, engine: Engine, log: Any) -> None:
        self.engine, self.log = engine, log
        self.inner = RefitterDouble(engine.plan)

    def get_weights_prototype(self, name: str) -> Weights:
        types = self.engine.library.DataType
        found = self.inner.prototype(name)
        return Weights(types.FLOAT, 0, -1) if found is None else Weights(types[TYPES[found[0]]], 0, found[1])

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        assert isinstance(ctypes.string_at(weights.numpy, 1), bytes)
        spelled = next(ours for ours, theirs in TYPES.items() if theirs == weights.dtype.name)
        return self.inner.set(name, spelled, weights.size, weights.numpy)

    def get_missing_weights(self) -> list[str]:
        return list(self.inner.missing())

    def refit_cuda_engine(self) -> bool:
        return not self.engine.library.fails(self.log) and self.inner.refit()
