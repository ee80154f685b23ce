"""Drives plugin objects as TensorRT does, without an engine: on the CPU's stand-in for a GPU, or on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from runtime.kernels.cuda.device_launcher import DeviceLauncher
from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.tensorrt.flavor import Flavor
from runtime.tensorrt_plugins.callbacks import PreparingLauncher, Shared
from runtime.tensorrt_plugins.creators import plugin_creators
from tests.support.kernel_devices import Buffer, Device

_TYPES: Mapping[np.dtype[Any], str] = {
    np.dtype(np.float32): "FLOAT",
    np.dtype(np.float16): "HALF",
    np.dtype(np.int64): "INT64",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "FP8",
}


class Shaped(Protocol):
    """Something with a shape and a type, such as a buffer or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


@dataclass(frozen=True, slots=True)
class PreparedOnly:
    """A launcher that launches what was prepared and nothing else: a step must not compile or load.

    calls: how many kernels each call of `prepare` named.
    """

    launcher: Launcher
    prepared: set[Kernel] = field(default_factory=set)
    calls: list[int] = field(default_factory=list)

    @property
    def limits(self) -> DeviceLimits:
        return self.launcher.limits

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        named = tuple(kernels)
        self.calls.append(len(named))
        self.prepared.update(named)

    def launch(
        self, kernel: Kernel, *, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        assert kernel in self.prepared, f"{kernel} was not prepared"
        self.launcher.launch(kernel, grid=grid, threads=threads, shared_bytes=shared_bytes, params=params)


@dataclass(slots=True)
class DrivenPlugin:
    """A node's plugin. device: where its kernels run. planned: the device that the engine is built for.

    built, running: the objects of the two phases, of which the second is made of what the first serialises.
    """

    flavor: Flavor
    device: Device
    name: str
    attributes: Mapping[str, int | float | str]
    planned: DeviceLimits | None = None
    node: str = "layers.0.node"
    launcher: DeviceLauncher | PreparedOnly = field(init=False)
    shared: Shared = field(init=False)
    creator: Any = field(init=False)
    runtime_creator: Any = field(init=False)
    built: Any = field(init=False, default=None)
    running: Any = field(init=False, default=None)
    _kept: list[Any] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        launcher = self.device.launcher
        self.launcher = launcher if isinstance(launcher, DeviceLauncher) else PreparedOnly(launcher)

        def launchers(stream: int) -> PreparingLauncher:
            return self.launcher

        self.shared = Shared(launchers)
        planned = self.planned or launcher.limits
        self.creator = plugin_creators(self.flavor, (self.name,), planned, self.shared)[self.name]
        self.runtime_creator = plugin_creators(self.flavor, (self.name,), None, self.shared)[self.name]

    def build(self, low: Sequence[Shaped], high: Sequence[Shaped], outputs: Sequence[Shaped]) -> int:
        """All that a builder asks, for inputs between `low` and `high`; returns the bytes of the workspace."""
        trt = self.flavor.trt
        created = self.creator.create_plugin(self.node, self._fields(), trt.TensorRTPhase.BUILD)
        self.shared.failures.raise_first()
        self.built = created.clone().attach_to_context(None)
        types = self.built.get_output_data_types([self._type(x) for x in low])
        assert types == [self._type(x) for x in outputs]
        given = [self._range(a, b) for a, b in zip(low, high, strict=True)]
        made = [self._range(x, x) for x in outputs]
        assert all(
            self.built.supports_format_combination(index, [*given, *made], len(given))
            for index in range(len(given) + len(made))
        )
        self.built.configure_plugin(given, made)
        return int(self.built.get_workspace_size(given, made))

    def load(self) -> None:
        """What happens between a plan and an execution context: the plugin is made of what was serialised."""
        runtime = self.flavor.trt.TensorRTPhase.RUNTIME
        loaded = self.runtime_creator.create_plugin(self.node, self.built.get_fields_to_serialize(), runtime)
        self.shared.failures.raise_first()
        self.running = loaded.clone().attach_to_context(None)

    def run(self, inputs: Sequence[Buffer], outputs: Sequence[Buffer], workspace: int, stream: int = 0) -> None:
        """One step. workspace: an address."""
        described = [self._described(x) for x in inputs], [self._described(x) for x in outputs]
        self.running.on_shape_change(*described)
        self.running.enqueue(*described, [x.address for x in inputs], [x.address for x in outputs], workspace, stream)

    def _fields(self) -> Any:
        """The attributes as the ONNX parser passes them."""
        trt = self.flavor.trt
        fields = []
        for name, value in self.attributes.items():
            if isinstance(value, str):
                array, kind = np.frombuffer(value.encode() + b"\0", np.int8), trt.PluginFieldType.CHAR
            elif isinstance(value, int):
                array, kind = np.array([value], np.int32), trt.PluginFieldType.INT32
            else:
                array, kind = np.array([value], np.float32), trt.PluginFieldType.FLOAT32
            self._kept.append(array)  # a field is an address
            fields.append(trt.PluginField(name, array, kind))
        return trt.PluginFieldCollection(fields)

    def _type(self, buffer: Shaped) -> Any:
        return getattr(self.flavor.trt.DataType, _TYPES[np.dtype(buffer.dtype)])

    def _described(self, buffer: Shaped) -> Any:
        described = self.flavor.trt.PluginTensorDesc()
        described.dims = self.flavor.trt.Dims(buffer.shape)
        described.type = self._type(buffer)
        described.format = self.flavor.trt.TensorFormat.LINEAR
        return described

    def _range(self, low: Shaped, high: Shaped) -> Any:
        described = self.flavor.trt.DynamicPluginTensorDesc()
        described.desc = self._described(high)
        described.min, described.opt, described.max = (self.flavor.trt.Dims(x.shape) for x in (low, high, high))
        return described
