"""The same small graph in float64, so that a proof is not limited by float32's rounding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.graph import Refusal

_NARROW, _WIDE = ir.DataType.FLOAT, ir.DataType.DOUBLE


def widen(model: ir.Model) -> None:
    """Turn every float32 value, constant and cast target of `model` into float64, in place.

    Function bodies stay as they are: they cast their constants to the type of their inputs. Raises Refusal for a node
    with a graph of its own, whose types this does not follow.
    """
    graph = model.graph
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.dtype == _NARROW:
            value.type = ir.TensorType(_WIDE)  # a new one: copies of a value share theirs with the original
    for name, value in graph.initializers.items():
        if value.const_value is not None and value.dtype == _NARROW:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float64), name=name)
            value.type = ir.TensorType(_WIDE)
    for node in graph:
        for attribute in list(node.attributes.values()):
            _widen_attribute(node, attribute)


def _widen_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    kind, name = attribute.type, attribute.name
    if kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise Refusal("a node with a graph of its own is not widened", node)
    if node.domain != "":
        return
    if kind == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _NARROW:
        node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.as_tensor().numpy().astype(np.float64)))
    elif node.op_type == "Constant" and kind in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        single = kind == ir.AttributeType.FLOAT
        data = np.array(attribute.as_float() if single else attribute.as_floats(), np.float64)
        node.attributes.pop(name)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(data))
    elif name in ("to", "dtype", "softmax_precision", "stash_type") and attribute.as_int() == _NARROW.value:
        node.attributes[name] = ir.AttrInt64(name, _WIDE.value)
