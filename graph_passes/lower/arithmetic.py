"""Gives the products of a model another type, bfloat16 or float16, for engines that compute in it.

Only what takes time is computed in that type: linear layers, attention, experts. The rest stays float32: norms,
activations, rotary tables, the router, the residual stream and the logits. It is little work, engines fuse
it into one pass with the casts around it, and its rounding errors would add up from layer to layer.

Every value has the type that its maker gives it, and a reader that wants another one reads it through a Cast. Shapes
are moved around in whatever type they are in.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.ops.base import DOMAIN
from graph_passes.ops.gated_activation import GATED_ACTIVATION
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.moe_gate import MOE_GATE
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.quantized_moe import QUANTIZED_MIXTURE_OF_EXPERTS
from graph_passes.ops.rms_norm import RMS_NORM
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION
from graph_passes.ops.stored_matmul import STORED_MATMUL
from runtime.errors import FusionError

ARITHMETIC = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
}
RINGS = {**ARITHMETIC, "float8": ir.DataType.FLOAT8E4M3FN}

_NARROW_INPUTS = {
    STORED_MATMUL.name: (0,),
    QUANTIZED_MATMUL.name: (0,),
    MIXTURE_OF_EXPERTS.name: (0,),
    QUANTIZED_MIXTURE_OF_EXPERTS.name: (0,),
    ROLLING_ATTENTION.name: (0, 1, 2),
}
"""Ops that compute in the chosen type, and their inputs of that type; their first output has it too."""

_WIDE_OPS = (RMS_NORM.name, GATED_ACTIVATION.name, MOE_GATE.name)
_MOVED = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Gather", "Expand", "Slice", "Split", "Identity"})
"""Standard ops that move what their first input holds, whatever type it has."""

_FLOATS = frozenset(ARITHMETIC.values())


def lower_arithmetic(model: ir.Model, arithmetic: str, kv: str) -> None:
    """Rewrite `model`, a bundle's graph computing in float32, in place; weights keep their types.

    arithmetic: a key of ARITHMETIC. kv: a key of RINGS, the type of all rings.
    Raises FusionError for a graph with operators whose types this does not follow, such as rings with scales.
    """
    narrow = ARITHMETIC[arithmetic]
    rings = [node.inputs[index] for node in model.graph for index in (5, 6) if _is(node, ROLLING_ATTENTION.name)]
    for value in rings:
        assert value is not None
        value.type = ir.TensorType(RINGS[kv])
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    constants: set[ir.Value] = set()
    for node in list(model.graph):
        if node.inputs and all(v is None or v.is_initializer() or v in constants for v in node.inputs):
            constants.update(node.outputs)  # it makes a weight out of stored ones
        elif node.domain == DOMAIN and node.op_type in _NARROW_INPUTS and not _is_router(node):
            for index in _NARROW_INPUTS[node.op_type]:
                _read_as(model, node, index, narrow, casts)
            _give(node.outputs[0], narrow)
            for ring in node.outputs[1:]:
                _give(ring, RINGS[kv])
        elif node.domain == DOMAIN and (node.op_type in _WIDE_OPS or _is_router(node)):
            _all_wide(model, node, casts)
        elif node.domain == DOMAIN:
            raise FusionError(
                f"{node.op_type} {node.name!r} cannot be built with {arithmetic} arithmetic. Export the checkpoint "
                "with --kv float32 or float16 (kv='float16')."
            )
        elif node.op_type in _MOVED:
            assert node.inputs[0] is not None
            for output in node.outputs:
                _give(output, node.inputs[0].dtype)
        elif node.op_type != "Cast":
            _all_wide(model, node, casts)
    for index, output in enumerate(model.graph.outputs):
        maker = output.producer()
        if output.dtype in _FLOATS and output.dtype != ir.DataType.FLOAT and not _is(maker, ROLLING_ATTENTION.name):
            model.graph.outputs[index] = _wide_output(model, output)


def _is(node: ir.Node | None, op: str) -> bool:
    return node is not None and (node.domain, node.op_type) == (DOMAIN, op)


def _is_router(node: ir.Node) -> bool:
    """Whether a product makes router logits: few of them, and a rounded one may send a token to another expert."""
    readers = [use.node for use in node.outputs[0].uses()]
    product = _is(node, STORED_MATMUL.name) or _is(node, QUANTIZED_MATMUL.name)
    return product and bool(readers) and all(_is(reader, MOE_GATE.name) for reader in readers)


def _give(value: ir.Value, dtype: ir.DataType | None) -> None:
    assert dtype is not None
    if value.dtype != dtype:
        value.type = ir.TensorType(dtype)


def _all_wide(model: ir.Model, node: ir.Node, casts: dict[tuple[ir.Value, ir.DataType], ir.Value]) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in _FLOATS and not (index > 0 and _is_router(node)):
            _read_as(model, node, index, ir.DataType.FLOAT, casts)
    # What it gives out was float32, an integer or a boolean before, and is so still.


def _read_as(
    model: ir.Model,
    node: ir.Node,
    index: int,
    dtype: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> None:
    """Let `node` read its input `index` in type `dtype`; a value is cast once for all that want it so."""
    value = node.inputs[index]
    assert value is not None
    if value.dtype == dtype:
        return
    if value.is_initializer():
        raise FusionError(f"{node.op_type} {node.name!r} reads the constant {value.name} in another type.")
    if (value, dtype) not in casts:
        made = ir.Value(name=f"{value.name}.{dtype.name.lower()}", type=ir.TensorType(dtype), shape=value.shape)
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[made], name=f"{made.name}.cast")
        maker = value.producer()
        if maker is None:
            model.graph.insert_before(model.graph[0], cast)
        else:
            model.graph.insert_after(maker, cast)
        casts[value, dtype] = made
    node.replace_input_with(index, casts[value, dtype])


def _wide_output(model: ir.Model, output: ir.Value) -> ir.Value:
    """The graph's output in float32, under its name."""
    name = str(output.name)
    wide = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=output.shape)
    maker = output.producer()
    assert maker is not None
    output.name = f"{name}.narrow"
    cast = ir.Node("", "Cast", [output], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[wide], name=f"{name}.cast")
    model.graph.insert_after(maker, cast)
    return wide
