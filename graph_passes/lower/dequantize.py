"""Quantised products in standard operators: DequantizeLinear of signed numbers in blocks, then the product itself.

    QuantizedMatMul(x, packed, scale)  →  StoredMatMul(x, DequantizeLinear(q, scale))      q = packed − 8 or − 128

Engines that know weight-only products recognise this and never store the dequantised weight. They do not round
activations to 8 bits, which QuantizedMatMul allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from graph_passes.ops.base import DOMAIN, Attributes, PluginOp, declare_op
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.quantized_moe import QUANTIZED_MIXTURE_OF_EXPERTS
from graph_passes.ops.stored_matmul import STORED_MATMUL
from runtime.errors import FusionError

SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}

Bind = Callable[[ir.Value, ir.DataType, Sequence[int], bool], ir.Value]
"""Gives the value to read in the place of a weight, of another type and shape. Last: whether its product fuses."""


def dequantize_products(model: ir.Model, scale_type: ir.DataType, bind: Bind) -> int:
    """Rewrite every quantised product of `model` in place; returns how many there were.

    scale_type: what scales are read as, which is the type of the dequantised weights. bind: called with the packed
    numbers and the scales of each weight. Raises FusionError for zero points, which weight-only products of engines do
    not have, and for rows that are no whole number of blocks.
    """
    found = 0
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        if node.op_type == QUANTIZED_MATMUL.name:
            _refuse_zero_points(node, len(node.inputs) > 3 and node.inputs[3] is not None)
            K, N = node.attributes["K"].as_int(), node.attributes["N"].as_int()
            weight = _dequantized(model, node, 1, [N, K], scale_type, bind)
            _replace(model, node, STORED_MATMUL, [node.inputs[0], weight], {})
        elif node.op_type == QUANTIZED_MIXTURE_OF_EXPERTS.name:
            _refuse_zero_points(node, bool(node.attributes["zero_points"].as_int()))
            E, I, C = (node.attributes[key].as_int() for key in ("num_experts", "intermediate", "hidden"))
            stacks = [
                _dequantized(model, node, index, shape, scale_type, bind)
                for index, shape in ((3, [E, I, C]), (5, [E, I, C]), (7, [E, C, I]))
            ]
            activation = {"activation": node.attributes["activation"].as_string()}
            _replace(model, node, MIXTURE_OF_EXPERTS, [*node.inputs[:3], *stacks], activation)
        else:
            continue
        found += 1
    return found


def _refuse_zero_points(node: ir.Node, has: bool) -> None:
    if has:
        raise FusionError(
            f"{node.name}: the weights have zero points, and the weight-only products of this backend have none. "
            "Export the checkpoint with --no-zero-points (zero_points=False), or with --weights fp32 if it is "
            "quantised already."
        )


def _dequantized(
    model: ir.Model, node: ir.Node, index: int, shape: Sequence[int], scale_type: ir.DataType, bind: Bind
) -> ir.Value:
    """The weight [..., N, K] behind the packed numbers and scales at inputs `index` and `index + 1`."""
    packed, scale = node.inputs[index], node.inputs[index + 1]
    assert packed is not None
    assert scale is not None
    bits, size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    *leading, K = shape
    if K % size:
        raise FusionError(
            f"{node.name}: rows of {K} weights are no whole number of blocks of {size}. Export with a --block-size "
            "that divides them."
        )
    if scale_type not in (scale.dtype, ir.DataType.FLOAT):
        raise FusionError(
            f"{node.name}: the weights have {_called(scale.dtype)} scales, which would be rounded again, to "
            f"{_called(scale_type)}. Export the checkpoint with scales of one type: with --weights fp32 if it is "
            "quantised already, or the original one with --scales."
        )
    fuses = bits == min(SIGNED)  # eight bits are dequantised by a kernel of its own, wherever they come from
    numbers = bind(packed, SIGNED[bits], shape, fuses)
    scales = bind(scale, scale_type, [*leading, K // size], fuses)
    made = ir.Value(name=f"{packed.name}.dequantized", type=ir.TensorType(scale_type), shape=ir.Shape(shape))
    attributes = [ir.AttrInt64("axis", len(leading)), ir.AttrInt64("block_size", size)]
    dequantize = ir.Node(
        "", "DequantizeLinear", [numbers, scales], attributes, outputs=[made], name=f"{made.name}.node"
    )
    model.graph.insert_before(node, dequantize)
    return made


def _called(dtype: ir.DataType | None) -> str:
    assert dtype is not None
    return {ir.DataType.FLOAT: "float32"}.get(dtype, dtype.name.lower())


def _replace(
    model: ir.Model, node: ir.Node, op: PluginOp, inputs: Sequence[ir.Value | None], attributes: Attributes
) -> None:
    """Without the marks of a plugin node: a plugin would want each dequantised weight in memory."""
    old = node.outputs[0]
    name = old.name
    new = ir.Value(name=name, type=old.type, shape=old.shape)
    made = ir.node(op.name, inputs, attributes, domain=DOMAIN, outputs=[new])
    made.name = node.name
    made.metadata_props.update(node.metadata_props)
    declare_op(model, op, attributes, str(node.name))
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [made], [old], [new])
    new.name = name
