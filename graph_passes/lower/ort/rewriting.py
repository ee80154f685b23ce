"""What the passes for ONNX Runtime share: constants, casts of weights, and one value in the place of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.ops.base import DOMAIN


def is_op(node: ir.Node | None, *names: str) -> bool:
    """Whether the node is one of Cierzo's operators of these names."""
    return node is not None and node.domain == DOMAIN and node.op_type in names


def shape_of(value: ir.Value) -> list[int | ir.SymbolicDim]:
    """The shape of a value that has one."""
    assert value.shape is not None, value.name
    return list(value.shape)


def dtype_of(value: ir.Value) -> ir.DataType:
    """The type of a value that has one."""
    assert value.dtype is not None, value.name
    return value.dtype


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator always has."""
    value = node.inputs[index]
    assert value is not None, node.name
    return value


def constant(model: ir.Model, data: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> ir.Value:
    """The array as an initializer, which all its readers share."""
    spelled = "_".join(str(number).replace("-", "m").replace(".", "p") for number in data.reshape(-1))
    name = f"ort.{data.dtype}.{'x'.join(map(str, data.shape))}.{spelled}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(data, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape), const_value=tensor)
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def integers(model: ir.Model, numbers: Sequence[int]) -> ir.Value:
    """An int64 constant of one axis."""
    return constant(model, np.array(numbers, np.int64))


def insert(
    model: ir.Model,
    before: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    output: ir.Value | Sequence[ir.Value],
    attributes: dict[str, int | float | str] | None = None,
    domain: str = "",
) -> ir.Value:
    """Put a node in front of `before`; returns its first output."""
    outputs = [output] if isinstance(output, ir.Value) else list(output)
    node = ir.node(op, inputs, attributes, domain=domain, outputs=outputs, name=f"{outputs[0].name}.{op.lower()}")
    node.metadata_props.update(before.metadata_props)
    model.graph.insert_before(before, node)
    if domain:
        model.opset_imports[domain] = 1
        model.graph.opset_imports[domain] = 1
    return outputs[0]


def fresh(name: str, dtype: ir.DataType, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    """A value that no node makes yet."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def like(value: ir.Value, name: str) -> ir.Value:
    """A value of this one's type and shape that no node makes yet."""
    return fresh(name, dtype_of(value), shape_of(value))


def weight_as(model: ir.Model, before: ir.Node, weight: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The weight in the type `dtype`: behind a Cast where it is stored in another one."""
    if weight.dtype == dtype:
        return weight
    made = fresh(f"{weight.name}.{dtype.name.lower()}", dtype, shape_of(weight))
    return insert(model, before, "Cast", [weight], made, {"to": int(dtype)})


def substitute(model: ir.Model, node: ir.Node, output: ir.Value, made: ir.Value) -> None:
    """Let all readers of `output`, the graph among them, read `made`, which takes its name."""
    name = output.name
    ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
    output.name = f"{name}.replaced"
    made.name = name
    if not any(value.uses() for value in node.outputs):
        model.graph.remove(node, safe=True)
