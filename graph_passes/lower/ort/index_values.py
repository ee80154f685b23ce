"""Tells what integers a graph computes from its inputs' shapes and positions, by computing them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

Int64Array = npt.NDArray[np.int64]

_MOST_NODES = 64
"""Indices are made by a dozen nodes; what more of them make is none."""


def computed(value: ir.Value, feeds: Mapping[str, Int64Array]) -> Int64Array | None:
    """What `value` is for these graph inputs; None if it depends on others, on a weight, or on too much."""
    nodes: dict[ir.Node, None] = {}
    constants: dict[str, ir.TensorProtocol] = {}
    if not _collect(value, feeds, nodes, constants):
        return None
    order = list(nodes)
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in order],
        "indices",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in feeds],
        [onnx.helper.make_tensor_value_info(str(value.name), onnx.TensorProto.INT64, None)],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    results: list[Int64Array] = ReferenceEvaluator(model).run(None, dict(feeds))  # type: ignore[assignment]
    return results[0]


def _collect(
    value: ir.Value,
    feeds: Mapping[str, Int64Array],
    nodes: dict[ir.Node, None],
    constants: dict[str, ir.TensorProtocol],
) -> bool:
    """Gather the nodes behind `value` in the order in which they run; whether that is all integers of `feeds`."""
    if value.const_value is not None:
        if value.const_value.dtype != ir.DataType.INT64:
            return False
        constants[str(value.name)] = value.const_value
        return True
    node = value.producer()
    if node is None:
        return value.name in feeds
    if node in nodes:
        return True
    if node.domain != "" or len(nodes) >= _MOST_NODES or value.dtype != ir.DataType.INT64:
        return False
    if not all(source is None or _collect(source, feeds, nodes, constants) for source in node.inputs):
        return False
    nodes[node] = None
    return True
