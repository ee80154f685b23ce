"""Element types of all values of a graph, those inside of inlined function bodies included."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from exporter.build.cuda_provider import KERNELS

Types = dict[str, ir.DataType]


def value_types(model: onnx.ModelProto) -> Types:
    """The type of every value of `model` that has one and can be told: by declaration, or by the op that makes it.

    model: without function bodies; the nodes in an order in which they can run.
    """
    graph = model.graph
    opset = next(imported.version for imported in model.opset_import if imported.domain == "")
    known: Types = {tensor.name: ir.DataType(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        known[value.name] = ir.DataType(value.type.tensor_type.elem_type)
    known.pop("", None)
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name and name not in known and (found := _output_type(node, index, known, opset)) is not None:
                known[name] = found
    return known


def _output_type(node: onnx.NodeProto, index: int, known: Types, opset: int) -> ir.DataType | None:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.domain == "" and node.op_type == "Cast":
        return ir.DataType(attributes["to"].i)
    if node.domain == "" and node.op_type == "Constant":
        return _constant_type(node.attribute[0])
    if node.domain != "" or not onnx.defs.has(node.op_type, opset):
        kernel = KERNELS.get((node.domain, node.op_type))
        return None if kernel is None else known.get(node.input[kernel.outputs_like])
    schema = onnx.defs.get_schema(node.op_type, opset)
    formal = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    for place, name in enumerate(node.input):
        if name in known and schema.inputs[min(place, len(schema.inputs) - 1)].type_str == formal:
            return known[name]
    allowed = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == formal), [formal])
    return _spelled(allowed[0]) if len(allowed) == 1 else None


def _constant_type(attribute: onnx.AttributeProto) -> ir.DataType | None:
    if attribute.name == "value":
        return ir.DataType(attribute.t.data_type)
    kind = {"value_float": "FLOAT", "value_floats": "FLOAT", "value_int": "INT64", "value_ints": "INT64"}
    return ir.DataType[kind[attribute.name]] if attribute.name in kind else None


def _spelled(type_text: str) -> ir.DataType | None:
    """The type that ONNX writes as "tensor(int64)"."""
    inner = type_text.removeprefix("tensor(").removesuffix(")").upper()
    return ir.DataType[inner] if inner in ir.DataType.__members__ else None
