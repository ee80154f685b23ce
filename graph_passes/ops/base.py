"""What a plugin op is: a name, a function body of standard operators, and inputs that seek its boundaries.

All of them live in the domain `cierzo`, version 1. A backend may register a kernel or plugin under the same name;
where none is registered the body runs, and so every bundle runs on any ONNX runtime of opset 24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

from graph_passes.graph import Dim
from runtime.errors import FusionError

DOMAIN = "cierzo"
VERSION = 1
OPSET = 24

Attributes = Mapping[str, int | float | str]
Arrays = tuple[npt.NDArray[Any], ...]
Shapes = Sequence[tuple[Dim, ...]]
Examples = Callable[[np.random.Generator, Attributes, Shapes], Iterator[Arrays]]


@dataclass(frozen=True, slots=True)
class PluginOp:
    """One operator of the domain `cierzo`.

    inputs, outputs: names that carry shapes, in order.
    attributes: name to ONNX type word ("int", "float", "string").
    body: the statements of the function body in ONNX's text format, given the attributes.
    examples: tuples of input arrays on which two implementations must agree; they sit on the op's boundaries, and
        they may be smaller than the shapes of the node to be proved where the op does not care about a size.
    pointwise: inputs and outputs all have one shape, of any rank; their names then carry no shape.
    rows: the op works on the last axis of its first input, which like the output may have any axes before it.
    calls: plugin ops whose function bodies this one's body calls.
    imports: operator sets besides the standard one that the body needs, name to version.
    optional: how many of the last inputs may be left out.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, str]
    body: Callable[[Attributes], str]
    examples: Examples
    pointwise: bool = False
    rows: bool = False
    calls: tuple[PluginOp, ...] = ()
    imports: Mapping[str, int] = field(default_factory=dict)
    optional: int = 0

    def function(self, attributes: Attributes) -> ir.Function:
        """The function body for these attributes, opset 24."""
        declared = ", ".join(f"{name}: {kind}" for name, kind in self.attributes.items())
        sets = {"": OPSET, **({DOMAIN: VERSION} if self.calls else {}), **self.imports}
        imported = ", ".join(f'"{name}" : {version}' for name, version in sets.items())
        text = (
            f'<domain: "{DOMAIN}", opset_import: [{imported}]>\n'
            f"{self.name} {f'<{declared}>' if declared else ''} "
            f"({', '.join(self.inputs)}) => ({', '.join(self.outputs)})\n"
            f"{{\n{self.body(attributes)}\n}}\n"
        )
        proto: onnx.FunctionProto = onnx.parser.parse_function(text)
        for index, node in enumerate(proto.node):  # an engine's profile then says of which body a node is part
            node.name = str(index)
        return ir.serde.deserialize_function(proto)

    def functions(self, attributes: Attributes) -> Iterator[ir.Function]:
        """The function body and those that it calls, each once or more."""
        yield self.function(attributes)
        for op in self.calls:
            yield from op.functions(attributes)

    def node(self, inputs: Sequence[ir.Value | None], attributes: Attributes, outputs: Sequence[ir.Value]) -> ir.Node:
        """A node of this op, marked so that TensorRT's parser looks for a plugin before it inlines the body."""
        marks = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
        return ir.node(self.name, inputs, {**attributes, **marks}, domain=DOMAIN, outputs=outputs)


def declare(model: ir.Model, function: ir.Function) -> None:
    """Carry `function` in `model`; an equal one may already be there."""
    model.functions[function.identifier()] = function
    for domain, version in function.opset_imports.items():
        if domain != "":
            model.opset_imports[domain] = version
            model.graph.opset_imports[domain] = version
    model.opset_imports[DOMAIN] = VERSION
    model.graph.opset_imports[DOMAIN] = VERSION


def declare_op(model: ir.Model, op: PluginOp, attributes: Attributes, place: str) -> None:
    """Carry the bodies that a node of `op` with these attributes needs; place: which node, for a reader.

    A file holds one body for each op: attributes that the body refers to may differ between nodes, the body itself may
    not. Raises FusionError where it does.
    """
    for function in op.functions(attributes):
        present = model.functions.get(function.identifier())
        if present is not None and _text(present) != _text(function):
            raise FusionError(
                f"{place}: this node needs another function body of {function.name} than an earlier one, and an ONNX "
                "file holds one. Layers that differ in this way, as in activations or zero points, cannot share a file."
            )
        declare(model, function)


def _text(function: ir.Function) -> bytes:
    return bytes(ir.to_proto(function).SerializeToString(deterministic=True))


def static(shape: tuple[Dim, ...], axis: int, otherwise: int) -> int:
    """The fixed extent of `axis`, or `otherwise` where the node leaves it open."""
    extent = shape[axis]
    return extent if isinstance(extent, int) else otherwise
