"""TensorRT's classes around the callbacks: made when a library is loaded, since they derive from its classes."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits
from runtime.tensorrt.flavor import Flavor
from runtime.tensorrt_plugins.callbacks import PluginCallbacks, Shared
from runtime.tensorrt_plugins.fields import names_asked_for, read_attributes, read_limits
from runtime.tensorrt_plugins.mixture_of_experts import MIXTURE_OF_EXPERTS
from runtime.tensorrt_plugins.moe_gate import MOE_GATE
from runtime.tensorrt_plugins.operation import Operation
from runtime.tensorrt_plugins.rolling_attention import PACKED_ROLLING_ATTENTION, ROLLING_ATTENTION

OPERATIONS: Mapping[str, Operation[Any]] = {
    operation.signature.name: operation
    for operation in (ROLLING_ATTENTION, PACKED_ROLLING_ATTENTION, MOE_GATE, MIXTURE_OF_EXPERTS)
}
"""Every node that a plugin runs, by its name."""
NAMESPACE, VERSION = "cierzo", "1"


class _Creator:
    """Makes a plugin of a node's attributes while an engine is built, and of what was serialised when one is loaded.

    planned: the device to build for; None where engines are only run.
    """

    interface: type

    def __init__(self, trt: Any, operation: Operation[Any], planned: DeviceLimits | None, shared: Shared) -> None:
        self.interface.__init__(self)  # type: ignore[misc]
        self.name, self.plugin_version, self.plugin_namespace = operation.signature.name, VERSION, NAMESPACE
        self.field_names = names_asked_for(trt, operation.signature)
        self.trt, self.operation, self.planned, self.shared = trt, operation, planned, shared

    def create_plugin(self, name: str, fields: Iterable[Any], phase: Any) -> Any:
        """The plugin, or None, by which the library's call fails."""
        try:
            given = list(fields)
            if phase == self.trt.TensorRTPhase.RUNTIME:
                planned = read_limits(given)
            elif self.planned is None:
                raise BackendError("plugins were registered to run engines, not to build them")
            else:
                planned = self.planned
            attributes = read_attributes(self.operation.signature, given)
            plugin: Callable[..., Any] = _plugin_class(self.trt)
            return plugin(self.trt, self.operation, attributes, planned, name, self.shared)
        except BaseException as error:
            self.shared.failures.note(f"The plugin {self.operation.signature.name} of node {name!r}", error)
            return None


def plugin_creators(
    flavor: Flavor, names: Iterable[str], planned: DeviceLimits | None, shared: Shared
) -> Mapping[str, Any]:
    """An IPluginCreatorV3One for each name in OPERATIONS. Raises BackendError for others."""
    creators = {}
    for name in names:
        if name not in OPERATIONS:
            raise BackendError(f"There is no plugin {name!r}. Available: {', '.join(OPERATIONS)}.")
        creators[name] = _creator_class(flavor.trt)(flavor.trt, OPERATIONS[name], planned, shared)
    return creators


@cache
def _plugin_class(trt: Any) -> Any:
    interfaces = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)
    return _derived("Plugin", (PluginCallbacks, *interfaces), {"interfaces": interfaces})


@cache
def _creator_class(trt: Any) -> Any:
    interface = trt.IPluginCreatorV3One
    return _derived("Creator", (_Creator, interface), {"interface": interface})


def _derived(name: str, bases: tuple[type, ...], members: Mapping[str, Any]) -> Any:
    return types.new_class(name, bases, exec_body=lambda namespace: namespace.update(members))
