"""Gives a graph with float32 rings the rings of a lowered one, so that both take and give the same.

What is stored is rounded exactly as RollingAttention's definition says, and what the graph reads is what was stored:
float16, or int8 with a float32 scale for each vector. Rounding what was rounded before changes nothing.
"""

from __future__ import annotations

import re

import onnx
import onnx_ir as ir

from graph_passes.ops.base import OPSET
from runtime.rolling_kv import INT8, scale_ring

DOMAIN = "cierzo.bisect"
"""Of functions that only graphs in memory have."""

_RING = re.compile(r"(past|present)\.\d+\.(key|value)")

_FUNCTIONS = {
    "float16": (
        "StoreHalf (wide) => (stored) { stored = Cast <to = 10> (wide) }",
        "ReadHalf (stored) => (wide) { wide = Cast <to = 1> (stored) }",
    ),
    INT8: (
        """StoreInt8 (wide) => (stored, scale) {
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    most = Constant <value_float = 127.0> ()
    magnitude = Abs (wide)
    largest = ReduceMax <keepdims = 1> (magnitude, last)
    unit = Div (largest, most)
    empty = Equal (unit, zero)
    divisor = Where (empty, one, unit)
    ratio = Div (wide, divisor)
    whole = Round (ratio)
    stored = Cast <to = 3> (whole)
    scale = Squeeze (unit, last)
}""",
        """ReadInt8 (stored, scale) => (wide) {
    last = Constant <value_ints = [-1]> ()
    number = Cast <to = 1> (stored)
    unit = Unsqueeze (scale, last)
    wide = Mul (number, unit)
}""",
    ),
}
_SUFFIX = {"float16": "Half", INT8: "Int8"}


def store_rings(model: ir.Model, dtype: str) -> None:
    """Rewrite `model`, whose rings are float32, in place. dtype: of the rings, as in a manifest."""
    if dtype == "float32":
        return
    for text in _FUNCTIONS[dtype]:
        declare(model, text)
    for value in list(model.graph.inputs):
        if _RING.fullmatch(str(value.name)):
            _read(model, value, dtype)
    for value in list(model.graph.outputs):
        if _RING.fullmatch(str(value.name)):
            _store(model, value, dtype)


def declare(model: ir.Model, text: str) -> None:
    """Add a function, `Name <attributes> (inputs) => (outputs) { statements }`, of DOMAIN to `model`."""
    whole = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{text}'
    function = ir.serde.deserialize_function(onnx.parser.parse_function(whole))
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = model.graph.opset_imports[DOMAIN] = 1


def is_store(node: ir.Node) -> bool:
    """Whether the node rounds a ring to what is stored."""
    return node.domain == DOMAIN and node.op_type.startswith("Store")


def _read(model: ir.Model, past: ir.Value, dtype: str) -> None:
    """The input `past` takes what is stored; all that read it read it widened."""
    name, shape = str(past.name), past.shape
    wide = ir.Value(name=f"{name}.wide", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    ir.convenience.replace_all_uses_with(past, wide)
    stored = [past]
    past.type = _type(dtype)
    if dtype == INT8:
        assert shape is not None
        scales = ir.Value(name=scale_ring(name), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(list(shape)[:3]))
        model.graph.inputs.append(scales)
        stored.append(scales)
    model.graph.insert_before(model.graph[0], [_node(f"Read{_SUFFIX[dtype]}", stored, [wide])])


def _store(model: ir.Model, present: ir.Value, dtype: str) -> None:
    """The output `present` becomes what is stored of it; all that read it read what was stored, widened."""
    name, shape, producer = str(present.name), present.shape, present.producer()
    assert producer is not None
    stored = [ir.Value(name=name, type=_type(dtype), shape=shape)]
    if dtype == INT8:
        assert shape is not None
        scale_type, scale_shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(list(shape)[:3])
        stored.append(ir.Value(name=scale_ring(name), type=scale_type, shape=scale_shape))
    wide = ir.Value(name=f"{name}.wide", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    place = list(model.graph.outputs).index(present)
    model.graph.outputs[place] = stored[0]
    ir.convenience.replace_all_uses_with(present, wide)
    present.name = f"{name}.computed"
    store = _node(f"Store{_SUFFIX[dtype]}", [present], stored)
    read = _node(f"Read{_SUFFIX[dtype]}", stored, [wide])
    for node in (store, read):
        node.metadata_props.update(producer.metadata_props)
    model.graph.insert_after(producer, [store, read])
    model.graph.outputs.extend(stored[1:])


def _type(dtype: str) -> ir.TensorType:
    return ir.TensorType(ir.DataType.INT8 if dtype == INT8 else ir.DataType.FLOAT16)


def _node(op: str, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Node:
    return ir.Node(DOMAIN, op, inputs, outputs=outputs, name=f"{outputs[0].name}.{op}")
