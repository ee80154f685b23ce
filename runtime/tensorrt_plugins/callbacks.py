"""The answers that TensorRT asks of a plugin, for any operation; `creators.py` makes TensorRT's classes of them.

An object lives through: create, then clone many times; while building, the questions about types, shapes and formats,
configure, workspace, serialise; while running, attach to a context, shape changes, enqueue. Three of these answers end
the process when they raise (get_capability_interface, clone, attach_to_context), so they do nothing that could.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.tensorrt_plugins.failures import Failures
from runtime.tensorrt_plugins.fields import serialized
from runtime.tensorrt_plugins.operation import Operation
from runtime.tensorrt_plugins.planned import PlannedLauncher
from runtime.tensorrt_plugins.signature import UNKNOWN, Attributes

_TYPES = {"BF16": "bfloat16", "HALF": "float16", "FLOAT": "float32", "FP8": "float8", "INT64": "int64"}
_NAMES = {ours: theirs for theirs, ours in _TYPES.items()}
MOST_SHAPES = 1024
"""For so many shapes a plugin remembers what it found out. A shape that comes again later is looked at again."""

Shapes = tuple[tuple[int, ...], ...]

Method = TypeVar("Method", bound=Callable[..., Any])


class PreparingLauncher(Launcher, Protocol):
    """A launcher that can be told ahead what it will launch, such as DeviceLauncher."""

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Compile and load, so that launching does neither."""
        ...


@dataclass(frozen=True, slots=True)
class Shared:
    """What the plugins of a registration share. launchers: a launcher for a stream's address; only asked when running.

    kernels: gathered while an engine is built: all that it may launch.
    """

    launchers: Callable[[int], PreparingLauncher]
    failures: Failures = field(default_factory=Failures)
    kernels: set[Kernel] = field(default_factory=set)


def _told(method: Method) -> Method:
    """What the method raises is kept for whoever called the library, and then raised: TensorRT's calls fail by it."""

    @functools.wraps(method)
    def telling(self: PluginCallbacks, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except BaseException as error:
            self.shared.failures.note(self.where, error)
            raise

    return telling  # type: ignore[return-value]


class PluginCallbacks:
    """One node. trt: TensorRT's module. planned: the device that workspace and kernels are planned for.

    The device that runs the engine has the same architecture but may have fewer or more multiprocessors. It divides
    the work in its own way where that fits into the memory that was planned, and as planned where it does not.
    """

    interfaces: tuple[type, ...] = ()

    def __init__(
        self,
        trt: Any,
        operation: Operation[Any],
        attributes: Attributes,
        planned: DeviceLimits,
        node: str,
        shared: Shared,
    ) -> None:
        for interface in self.interfaces:
            interface.__init__(self)  # type: ignore[misc]
        self.plugin_name, self.plugin_version, self.plugin_namespace = operation.signature.name, "1", "cierzo"
        self.num_outputs = len(operation.signature.outputs)
        self.trt, self.operation, self.attributes, self.planned = trt, operation, attributes, planned
        self.signature, self.node, self.shared = operation.signature, node, shared
        self.where = f"The plugin {operation.signature.name} of node {node!r}"
        self._ready: dict[Shapes, tuple[Any, bool]] = {}
        self._serialized: tuple[Any, Any] | None = None

    # -- what cannot fail ----------------------------------------------------------------------------------------------

    def get_capability_interface(self, capability: Any) -> Any:
        return self

    def clone(self) -> Any:
        return type(self)(self.trt, self.operation, self.attributes, self.planned, self.node, self.shared)

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def get_aliased_input(self, output: int) -> int:
        return self.signature.aliases.get(output, -1)

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        """There is one, so a builder with a GPU has nothing to compare and times no plugin on made-up positions."""

    # -- while an engine is built --------------------------------------------------------------------------------------

    @_told
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        bound = self.signature.bind_types([_type_name(dtype) for dtype in input_types])
        names = (bound.get(tensor.type, tensor.type) for tensor in self.signature.outputs)
        return [getattr(self.trt.DataType, _NAMES[name]) for name in names]

    @_told
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        """Also looks at all sizes that are known by now, as a refusal is safest here (see configure_plugin)."""
        extents = [list(shape) for shape in inputs]
        known = [[d.get_constant_value() if d.is_constant() else UNKNOWN for d in shape] for shape in extents]
        sizes = self.signature.bind_sizes(self.attributes, known)
        may_be_open = self.signature.dynamic + self.signature.implied
        if all(size != UNKNOWN or axis in may_be_open for axis, size in sizes.items()):
            least = {axis: 1 if axis in self.signature.dynamic else size for axis, size in sizes.items()}
            first = {name: allowed[0] for name, allowed in self.signature.choices.items()}
            self.operation.problem(self.attributes, least, first)
        expressions = {axis: builder.constant(size) for axis, size in sizes.items() if size != UNKNOWN}
        for tensor, shape in zip(self.signature.inputs, extents, strict=True):
            for axis, extent in zip(tensor.axes, shape, strict=True):
                expressions.setdefault(axis, extent)
        return [self.trt.DimsExprs([expressions[axis] for axis in tensor.axes]) for tensor in self.signature.outputs]

    @_told
    def supports_format_combination(self, position: int, tensors: Sequence[Any], num_inputs: int) -> bool:
        """Linear tensors alone, and types as `bind_types` takes them. What lies after `position` may not be read."""
        described = tensors[position].desc
        told = (*self.signature.inputs, *self.signature.outputs)
        first = next(index for index, tensor in enumerate(told) if tensor.type == told[position].type)
        fits = (
            described.type == tensors[first].desc.type
            if first < position
            else _type_name(described.type) in self.signature.allowed(told[first])
        )
        return bool(fits and described.format == self.trt.TensorFormat.LINEAR)

    @_told
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Looks at the least and largest shapes of a profile.

        What can be refused before is: a plugin that lies within a fused part of the graph, as those without aliased
        outputs do, spoils the process's heap when it raises here.
        """
        for bound in ("min", "max"):
            self._problem([(_type_name(x.desc.type), _extents(getattr(x, bound))) for x in inputs])

    @_told
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        types = self.signature.bind_types([_type_name(x.desc.type) for x in inputs])
        low, high = (
            self.signature.bind_sizes(self.attributes, [_extents(getattr(x, bound)) for x in inputs])
            for bound in ("min", "max")
        )
        most = 0
        for sizes in self.operation.hardest(low, high):
            problem = self.operation.problem(self.attributes, sizes, types)
            most = max(most, self.operation.workspace_bytes(problem, self.planned))
            self.shared.kernels.update(self.operation.kernels(problem, self.planned))
        return most

    @_told
    def get_fields_to_serialize(self) -> Any:
        arrays = serialized(self.attributes, self.planned)
        kinds = self.trt.PluginFieldType
        fields = [self.trt.PluginField(name, array, getattr(kinds, kind)) for name, (kind, array) in arrays.items()]
        collection = self.trt.PluginFieldCollection(fields)
        self._serialized = arrays, collection  # the library takes addresses, and reads them later
        return collection

    # -- while an engine runs ------------------------------------------------------------------------------------------

    @_told
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._prepared(tuple(_extents(x.dims) for x in inputs), inputs)

    @_told
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Queue the kernels; nothing is compiled, loaded or allocated for shapes that were met before.

        Raises BackendError for what no kernel computes, and when a shape is met for the first time while the stream is
        captured into a CUDA graph.
        """
        for output, source in self.signature.aliases.items():
            if outputs[output] != inputs[source]:
                raise BackendError(
                    f"{self.signature.outputs[output].name} must lie where {self.signature.inputs[source].name} does. "
                    "Give the engine one address for both."
                )
        problem, as_planned = self._prepared(tuple(_extents(x.dims) for x in input_desc), input_desc, stream)
        launcher: Launcher = self.shared.launchers(stream)
        if as_planned:
            launcher = PlannedLauncher(launcher, self.planned)
        self.operation.launch(launcher, problem, inputs, outputs, workspace)

    def _prepared(self, shapes: Shapes, inputs: Sequence[Any], stream: int = 0) -> tuple[Any, bool]:
        """The problem of these shapes, with its kernels loaded; and whether it has to be divided as planned.

        stream: where they will run, if that is known; nothing is loaded while it is captured.
        """
        known = self._ready.get(shapes)
        if known is not None:
            return known
        problem = self._problem([(_type_name(x.type), shape) for x, shape in zip(inputs, shapes, strict=True)])
        launcher = self.shared.launchers(stream)
        limits = launcher.limits
        if limits.compute_capability != self.planned.compute_capability:
            made, here = (".".join(map(str, x.compute_capability)) for x in (self.planned, limits))
            raise BackendError(
                f"The engine was built for compute capability {made}, and this GPU has {here}. Build one for it."
            )
        needed, given = (self.operation.workspace_bytes(problem, x) for x in (limits, self.planned))
        as_planned = needed > given
        launcher.prepare(self.operation.kernels(problem, self.planned if as_planned else limits))
        if len(self._ready) >= MOST_SHAPES:
            self._ready.clear()
        self._ready[shapes] = problem, as_planned
        return problem, as_planned

    def _problem(self, inputs: Sequence[tuple[str, Sequence[int]]]) -> Any:
        types = self.signature.bind_types([dtype for dtype, _ in inputs])
        sizes = self.signature.bind_sizes(self.attributes, [shape for _, shape in inputs])
        return self.operation.problem(self.attributes, sizes, types)


def _extents(dims: Any) -> tuple[int, ...]:
    """A Dims as a tuple; of all ways to get one a slice is thirty times as fast as an iteration."""
    return tuple(dims[:])


def _type_name(dtype: Any) -> str:
    """A DataType as everything else here spells it; those that no plugin takes in TensorRT's own words."""
    name = str(dtype.name)
    return _TYPES.get(name, name.lower())
