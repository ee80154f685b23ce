"""Gives every weight of the fused model the type that it is stored in, and quantised ones the nodes that read them.

A weight that is stored in two bytes is an initializer of that type, which StoredMatMul and MixtureOfExperts read as it
is; behind an embedding's Gather the few rows that were read are widened. A quantised one becomes three initializers
(numbers, scales, zero points) of a QuantizedMatMul or QuantizedMixtureOfExperts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from graph_passes.lower.formats import TYPES, LinearFormat, Quantized, Stored, packed_name, scale_name, zero_name
from graph_passes.ops.base import DOMAIN, Attributes, PluginOp, declare_op
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL, blocks, zero_bytes
from graph_passes.ops.quantized_moe import QUANTIZED_MIXTURE_OF_EXPERTS
from graph_passes.ops.stored_matmul import STORED_MATMUL
from graph_passes.unbound import UnboundWeight, is_unbound
from runtime.errors import FusionError

_STACKS = (3, 4, 5)
"""Inputs of MixtureOfExperts that are weights: gate, up, down."""


def lower_linears(model: ir.Model, formats: Mapping[str, LinearFormat]) -> None:
    """Rewrite `model`, whose weights are unbound and float32, in place.

    formats: by parameter, for matrices and stacks of matrices; one that is not named stays float32. Where the output
    projection is tied to the embedding, a format of its own name (`lm_head.weight`) is that of the product alone.
    Raises FusionError when a weight is read by a node that cannot read it in its format.
    """
    for node in list(model.graph):
        if (node.domain, node.op_type) == (DOMAIN, STORED_MATMUL.name):
            _lower_product(model, node, formats)
        elif (node.domain, node.op_type) == (DOMAIN, MIXTURE_OF_EXPERTS.name):
            _lower_experts(model, node, formats)
    for name, value in list(model.graph.initializers.items()):
        if is_unbound(value) and not value.uses():
            model.graph.initializers.pop(name)
        elif is_unbound(value) and isinstance(wanted := formats.get(name), Stored):
            _retype(model, value, wanted)
    for name, wanted in formats.items():
        held = packed_name(name) if isinstance(wanted, Quantized) else name
        due = TYPES["U8" if isinstance(wanted, Quantized) else wanted.dtype]
        found = model.graph.initializers.get(held)
        left = isinstance(wanted, Quantized) and name in model.graph.initializers
        if found is None or found.dtype != due or left:
            raise FusionError(f"The weight {name} is to be {wanted}, but some node of the graph cannot read it so.")
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]


def _lower_product(model: ir.Model, node: ir.Node, formats: Mapping[str, LinearFormat]) -> None:
    x, weight = node.inputs
    assert x is not None
    assert weight is not None
    name = str(weight.name)
    if name == "embed_tokens.weight" and "lm_head.weight" in formats:
        name = "lm_head.weight"
    wanted = formats.get(name)
    if not isinstance(wanted, Quantized):
        return
    assert weight.shape is not None
    N, K = weight.shape.numpy()
    inputs = [x, *_initializers(model, name, (N, K), wanted)]
    attributes = {"K": K, "N": N, "bits": wanted.bits, "block_size": wanted.block_size}
    _replace(model, node, QUANTIZED_MATMUL, inputs, attributes)


def _lower_experts(model: ir.Model, node: ir.Node, formats: Mapping[str, LinearFormat]) -> None:
    stacks = [node.inputs[index] for index in _STACKS]
    names = [str(stack.name) for stack in stacks if stack is not None]
    wanted = [formats.get(name, Stored("F32")) for name in names]
    if len(set(wanted)) > 1:
        raise FusionError(f"The experts {names} are to be {wanted}, but one node reads them all in one format.")
    if not isinstance(wanted[0], Quantized):
        return
    numbers, zeros = [], []
    sizes: list[tuple[int, ...]] = []
    for stack, name in zip(stacks, names, strict=True):
        assert stack is not None
        assert stack.shape is not None
        sizes.append(stack.shape.numpy())
        made = _initializers(model, name, sizes[-1], wanted[0])
        numbers += made[:2]
        zeros += made[2:]
    experts, intermediate, hidden = sizes[0]
    attributes: dict[str, int | str] = {
        "activation": node.attributes["activation"].as_string(),
        "bits": wanted[0].bits,
        "block_size": wanted[0].block_size,
        "hidden": hidden,
        "intermediate": intermediate,
        "num_experts": experts,
        "zero_points": int(wanted[0].zero_points),
    }
    _replace(model, node, QUANTIZED_MIXTURE_OF_EXPERTS, [*node.inputs[:3], *numbers, *zeros], attributes)


def _initializers(model: ir.Model, name: str, shape: tuple[int, ...], wanted: Quantized) -> list[ir.Value]:
    """Numbers, scales and, if there are any, zero points of a parameter [..., N, K], unbound."""
    *leading, K = shape
    B = blocks(K, wanted.block_size)
    made = [
        (packed_name(name), "U8", (*leading, B, wanted.block_size * wanted.bits // 8)),
        (scale_name(name), wanted.scale, (*leading, B)),
    ]
    if wanted.zero_points:
        made.append((zero_name(name), "U8", (*leading, zero_bytes(K, wanted.block_size, wanted.bits))))
    return [_unbound(model, *each) for each in made]


def _unbound(model: ir.Model, name: str, dtype: str, extents: Sequence[int]) -> ir.Value:
    if name not in model.graph.initializers:
        shape, kind = ir.Shape(extents), TYPES[dtype]
        weight = UnboundWeight(name, kind, shape)
        model.graph.register_initializer(ir.Value(name=name, type=ir.TensorType(kind), shape=shape, const_value=weight))
    return model.graph.initializers[name]


def _replace(
    model: ir.Model, node: ir.Node, op: PluginOp, inputs: Sequence[ir.Value | None], attributes: Attributes
) -> None:
    old = node.outputs[0]
    name = old.name
    new = ir.Value(name=name, type=old.type, shape=old.shape)
    made = op.node(inputs, attributes, [new])
    made.name = node.name
    made.metadata_props.update(node.metadata_props)
    declare_op(model, op, attributes, str(node.name))
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [made], [old], [new])
    new.name = name


def _retype(model: ir.Model, value: ir.Value, wanted: Stored) -> None:
    """Make the initializer one of the stored type; every reader must be one that takes it."""
    kind = TYPES[wanted.dtype]
    if value.dtype == kind:
        return
    for use in list(value.uses()):
        node = use.node
        if (node.domain, node.op_type) in ((DOMAIN, STORED_MATMUL.name), (DOMAIN, MIXTURE_OF_EXPERTS.name)):
            continue
        if node.domain != "" or node.op_type != "Gather" or use.idx != 0:
            raise FusionError(f"{node.op_type} {node.name!r} cannot read the weight {value.name} as {wanted.dtype}.")
        _widen_after(model, node, kind)
    assert value.shape is not None
    value.type = ir.TensorType(kind)
    value.const_value = UnboundWeight(str(value.name), kind, value.shape)


def _widen_after(model: ir.Model, gather: ir.Node, kind: ir.DataType) -> None:
    """Cast what was gathered, which is far less than what it was gathered from."""
    rows = gather.outputs[0]
    wide = ir.Value(name=f"{rows.name}__wide", type=rows.type, shape=rows.shape)
    cast = ir.Node(
        "", "Cast", [rows], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[wide], name=f"{gather.name}__widen"
    )
    cast.metadata_props.update(gather.metadata_props)
    ir.convenience.replace_all_uses_with(rows, wide)
    cast.replace_input_with(0, rows)
    name = rows.name
    rows.name, wide.name = f"{name}__stored", name
    rows.type = ir.TensorType(kind)
    model.graph.insert_after(gather, cast)
