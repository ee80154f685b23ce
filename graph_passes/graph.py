"""Reading a graph: the few questions that every matcher asks, and `Refusal`, the answer when one goes wrong.

A matcher walks from its anchor with these functions. The first that does not find what it needs raises `Refusal` with
a sentence and the node; nothing has been changed by then, and the driver keeps the sentence for the report.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.unbound import is_unbound

Dim = int | str
"""A static extent, or the text of a symbolic one ("T", "B*T")."""


class Refusal(Exception):
    """A rule does not apply: the reason in words, and the node where the walk ended."""

    def __init__(self, reason: str, node: ir.Node | None) -> None:
        where = f" at {node.op_type} {node.name!r}" if node is not None else ""
        super().__init__(f"{reason}{where}")
        self.reason = reason
        self.node = node


def constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The value's data if it is a constant with data, else None."""
    if value is None or value.const_value is None or is_unbound(value):
        return None
    return np.asarray(value.const_value.numpy())


def scalar(value: ir.Value | None) -> float | None:
    """The value as one number if it is a constant of one element, else None."""
    data = constant(value)
    return float(data.reshape(-1)[0]) if data is not None and data.size == 1 else None


def integers(value: ir.Value | None) -> list[int] | None:
    """The value as a list of integers if it is an integer constant, else None."""
    data = constant(value)
    return [int(x) for x in data.reshape(-1)] if data is not None and np.issubdtype(data.dtype, np.integer) else None


def dims(value: ir.Value) -> tuple[Dim, ...]:
    """The value's shape; refuses a value of unknown rank. An extent without a name equals no other extent."""
    if value.shape is None:
        raise Refusal(f"the shape of {value.name!r} is unknown", value.producer())
    return tuple(
        extent if isinstance(extent, int) else extent.value or f"?{value.name}.{axis}"
        for axis, extent in enumerate(value.shape)
    )


def static_dim(value: ir.Value, axis: int) -> int:
    """One static extent; refuses a symbolic one."""
    extent = dims(value)[axis]
    if not isinstance(extent, int):
        raise Refusal(f"axis {axis} of {value.name!r} is {extent}, but must be a fixed size", value.producer())
    return extent


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node:
    """The node that produces `value`, if it is a standard operator of one of `op_types`."""
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in op_types:
        found = f"{node.op_type}" if node is not None else "a graph input or weight"
        name = value.name if value is not None else "nothing"
        raise Refusal(f"{name!r} should come from {' or '.join(op_types)}, but comes from {found}", node)
    return node


def is_made_by(value: ir.Value | None, *op_types: str) -> bool:
    """Whether `made_by` would succeed."""
    node = value.producer() if value is not None else None
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def operand(node: ir.Node, index: int) -> ir.Value:
    """Input `index` of `node`; refuses an absent one."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Refusal(f"input {index} is missing", node)
    return value


def sole_consumer(value: ir.Value, op_type: str) -> ir.Node:
    """The only node that reads `value`, if it is a standard operator of `op_type`."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        raise Refusal(f"{value.name!r} has {len(users)} readers, but must have one", value.producer())
    node = users[0].node
    if node.domain not in ("", "ai.onnx") or node.op_type != op_type:
        raise Refusal(f"{value.name!r} should go into {op_type}, but goes into {node.op_type}", node)
    return node


def integer_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of `node`, or the operator's default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def permutation(node: ir.Node) -> list[int]:
    """The order that a Transpose gives the axes; without `perm` it reverses them."""
    attribute = node.attributes.get("perm")
    return [*attribute.as_ints()] if attribute is not None else [*reversed(range(len(dims(operand(node, 0)))))]


def refuse_reduction(scatter: ir.Node) -> None:
    """Refuses a ScatterElements that combines its updates with what is there."""
    attribute = scatter.attributes.get("reduction")
    if attribute is not None and attribute.as_string() != "none":
        raise Refusal(f"the scatter reduces ({attribute.as_string()}) instead of replacing", scatter)


def scope(node: ir.Node) -> str:
    """The module path that the tracer left on the node, such as `layers.0.self_attn`; empty at the top."""
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    scopes: Sequence[str] = ast.literal_eval(text) if text else ()
    return scopes[-2] if len(scopes) >= 2 else ""


def source_line(node: ir.Node) -> str:
    """The line of the traced program that made `node`, as the tracer noted it; empty when it did not."""
    lines = node.metadata_props.get("pkg.torch.onnx.stack_trace", "").strip().splitlines()
    return lines[-1].strip() if lines else ""


def data_leaves(value: ir.Value, stop: Iterable[ir.Value] = ()) -> list[ir.Value]:
    """Where the data of `value` comes from: graph inputs, weights, and values in `stop`, in order of discovery.

    Constants do not count, nor what is only asked for its shape.
    """
    borders, seen, found, stack = set(stop), set(), [], [value]
    while stack:
        current = stack.pop()
        if current in seen or constant(current) is not None:
            continue
        seen.add(current)
        node = current.producer()
        if current in borders or node is None:
            found.append(current)
        elif not (node.domain in ("", "ai.onnx") and node.op_type in ("Shape", "Size")):
            stack.extend(v for v in reversed(node.inputs) if v is not None)
    return found
