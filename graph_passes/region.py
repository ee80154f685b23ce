"""Runs a piece of a graph: the means by which masks are probed and rewrites are proved."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as state

from graph_passes.graph import Refusal, dims, integer_attribute, is_made_by, operand
from graph_passes.ops.base import DOMAIN
from graph_passes.precision import widen
from graph_passes.unbound import is_unbound

_RUN_ERRORS = (
    *(state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException),
    ir.serde.SerdeError,
)
"""What ONNX Runtime raises for a graph or an input that it cannot run, without a base class of their own, and what
onnx_ir raises for a graph that cannot be written, such as one with a value of unknown type.
"""

IR_VERSION = 11
"""The ONNX IR version of opset 24; older runtimes refuse a newer one."""


def run_options() -> onnxruntime.SessionOptions:
    """Nothing optimised, one thread: what is run is what is written, in a fixed order."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


class Region:
    """The nodes between `inputs` and `outputs`, as a model of their own.

    Graph inputs that the nodes ask only for a shape (`Shape(input_ids)`) have the extents that the symbolic dims of the
    other inputs imply: the shape itself is fed, or else, where more lies between, zeros of that shape. With `wide`
    everything that is float32 in the graph is float64 here.
    Raises Refusal when the nodes need data from outside `inputs`, or are no graph that can be run on its own.
    """

    def __init__(
        self, model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], *, wide: bool = False
    ) -> None:
        self._wide = wide
        self._nothing: dict[tuple[str, tuple[int, ...]], npt.NDArray[Any]] = {}
        self.inputs = tuple(inputs)
        self._shape_only = _shape_only_inputs(self.inputs, outputs)
        try:
            graph = ir.convenience.extract(model.graph, [*self.inputs, *self._shape_only], list(outputs))
        except ValueError as error:
            raise Refusal(f"the region has no clear border: {error}", None) from error
        except RuntimeError as error:  # its message would hold the whole graph
            raise Refusal(
                "the region holds a node (such as If) whose own graph reads values from outside", None
            ) from error
        for value in graph.inputs:
            value.const_value = None  # a weight that became an input is fed like any other
        for name in [name for name, value in graph.initializers.items() if value in graph.inputs]:
            graph.initializers.pop(name)
        for value in (v for node in graph for v in node.outputs):
            value.shape = None  # sizes may differ from the traced ones; ONNX Runtime works them out again
        for value in graph.outputs:
            value.shape = None
        shapes = {value.name for value in self._shape_only if value.producer() is not None}
        for value in graph.inputs:
            value.shape = ir.Shape([None] * (1 if value.name in shapes else len(value.shape or ())))
            if value.name in shapes:
                value.dtype = ir.DataType.INT64
        functions = [f for f in model.functions.values() if f.domain == DOMAIN]
        piece = ir.Model(graph, ir_version=IR_VERSION, functions=functions)
        if wide:
            widen(piece)
        try:
            self._session = session(piece)
        except _RUN_ERRORS as error:
            raise Refusal(f"the region is no graph of its own: {error}", None) from error

    def run(
        self, arrays: Sequence[npt.NDArray[Any]], extents: Mapping[str, int] | None = None
    ) -> list[npt.NDArray[Any]]:
        """The outputs for one array for each input; `extents` gives symbolic dims that no input shows.

        Raises Refusal when the arrays do not fit the region.
        """
        extents = dict(extents or {})
        for value, array in zip(self.inputs, arrays, strict=True):
            _bind_dims(value, array.shape, extents)
        feeds = {str(v.name): self._fed(a) for v, a in zip(self.inputs, arrays, strict=True)}
        for value in self._shape_only:
            asks = value.producer()
            known = dims(value if asks is None else operand(asks, 0))
            shape = tuple(d if isinstance(d, int) else extents.get(d, 1) for d in known)
            feeds[str(value.name)] = self._zeros(value, shape) if asks is None else _asked(asks, shape)
        try:
            return list(self._session.run(None, feeds))
        except _RUN_ERRORS as error:
            raise Refusal(f"the region cannot run on these inputs: {error}", None) from error

    def _zeros(self, value: ir.Value, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Never written to, and so without cost in memory; kept, since a ring of real size is asked for at each run."""
        key = str(value.name), shape
        if key not in self._nothing:
            dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
            self._nothing[key] = np.zeros(shape, np.float64 if self._wide and dtype == np.float32 else dtype)
        return self._nothing[key]

    def _fed(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.astype(np.float64) if self._wide and array.dtype == np.float32 else array


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    """An unoptimised CPU session of a small model."""
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), run_options(), providers=["CPUExecutionProvider"]
    )


def _shape_only_inputs(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> list[ir.Value]:
    """Graph inputs behind `outputs` that are reached past Shape alone, or what Shape says of them at once.

    The latter, since a ring of real size is tens of gigabytes, of zeros or not.
    """
    borders, seen, found = set(inputs), set(), []
    stack = [(value, False) for value in outputs]
    while stack:
        value, through_shape = stack.pop()
        if value in borders or (value, through_shape) in seen:
            continue
        seen.add((value, through_shape))
        node = value.producer()
        if (
            node is not None
            and is_made_by(value, "Shape")
            and operand(node, 0) not in borders
            and _given(node.inputs[0])
        ):
            if value not in found:
                found.append(value)
        elif node is not None:
            asks_shape = is_made_by(value, "Shape", "Size")
            stack.extend((v, asks_shape) for v in node.inputs if v is not None)
        elif _given(value):
            if not through_shape:
                raise Refusal(f"the region also needs the data of {value.name!r}", None)
            if value not in found:
                found.append(value)
    return found


def _given(value: ir.Value | None) -> bool:
    """Whether `value` comes from outside the graph, or is a weight without data."""
    return value is not None and value.producer() is None and (value.const_value is None or is_unbound(value))


def _asked(node: ir.Node, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """What a Shape node gives for its input's shape."""
    end = node.attributes.get("end")
    return np.array(shape[integer_attribute(node, "start", 0) : None if end is None else end.as_int()], np.int64)


def _bind_dims(value: ir.Value, shape: tuple[int, ...], extents: dict[str, int]) -> None:
    """Learn what symbolic dims stand for; two inputs that disagree are refused.

    In a product such as T*B the first unknown factor takes all that the known ones leave: any split is as good.
    """
    if len(dims(value)) != len(shape):
        raise Refusal(f"{value.name!r} has {len(dims(value))} axes and is given {len(shape)}", value.producer())
    for dim, extent in zip(dims(value), shape, strict=True):
        if not isinstance(dim, str) or not re.fullmatch(r"\w+(\*\w+)*", dim):
            continue
        factors = dim.split("*")
        for factor in factors:
            if factor not in extents:
                extents[factor] = extent // max(1, math.prod(extents.get(other, 1) for other in factors))
        implied = math.prod(extents[factor] for factor in factors)
        if implied != extent:
            raise Refusal(f"{dim} is {extent} in {value.name!r} and {implied} in the other inputs", value.producer())
