"""Lets attention read queries, keys and values out of the one product that makes them.

Split(product) → three Reshapes → RollingAttention   =   Reshape(product) → PackedRollingAttention
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.ops.base import DOMAIN, declare_op
from graph_passes.ops.packed_attention import PACKED_ROLLING_ATTENTION
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION


@dataclass(frozen=True, slots=True)
class _Packed:
    """A RollingAttention whose first three inputs are the parts of one `product`; `shape` is that of the Reshapes."""

    node: ir.Node
    product: ir.Value
    shape: ir.Value
    heads: int
    kv_heads: int


def pack_attention(model: ir.Model) -> int:
    """Rewrite `model` in place after `merge_products`; returns how many attention nodes read one product now.

    Others stay as they are: where something happens between projection and attention, such as a bias or a norm.
    """
    found = [packed for node in list(model.graph) if (packed := _match(node)) is not None]
    for packed in found:
        _replace(model, packed)
    return len(found)


def _match(node: ir.Node) -> _Packed | None:
    if (node.domain, node.op_type) != (DOMAIN, ROLLING_ATTENTION.name):
        return None
    reshapes = [None if value is None else value.producer() for value in node.inputs[:3]]
    if any(made is None or made.domain != "" or made.op_type != "Reshape" for made in reshapes):
        return None
    sources = [made.inputs[0] for made in reshapes if made is not None]
    shapes = {made.inputs[1] for made in reshapes if made is not None}
    split = sources[0].producer() if sources[0] is not None else None
    if split is None or split.domain != "" or split.op_type != "Split" or list(split.outputs) != sources:
        return None
    if len(shapes) != 1 or any(len(list(output.uses())) != 1 for output in split.outputs):
        return None
    product, shape = split.inputs[0], shapes.pop()
    heads = [value.shape[2] for value in node.inputs[:3] if value is not None and value.shape is not None]
    if product is None or shape is None or len(heads) != 3 or heads[1] != heads[2] or not _leaves_heads_open(shape):
        return None
    query, key, _ = heads
    return _Packed(node, product, shape, query, key) if isinstance(query, int) and isinstance(key, int) else None


def _leaves_heads_open(shape: ir.Value) -> bool:
    """Whether a shape [B, T, heads, D] says -1 for the heads, so that it holds for the whole product as well."""
    made = shape.producer()
    if made is None or made.op_type != "Concat" or len(made.inputs) != 4:
        return False
    heads = made.inputs[2]
    constant = None if heads is None else heads.const_value
    return constant is not None and constant.numpy().tolist() == [-1]


def _replace(model: ir.Model, packed: _Packed) -> None:
    node = packed.node
    query = node.inputs[0]
    assert query is not None
    assert query.shape is not None
    batch, tokens, _, head_dim = query.shape
    name = f"{packed.product.name}.heads"
    projected = ir.Value(
        name=name,
        type=packed.product.type,
        shape=ir.Shape([batch, tokens, packed.heads + 2 * packed.kv_heads, head_dim]),
    )
    reshape = ir.Node("", "Reshape", [packed.product, packed.shape], outputs=[projected], name=f"{name}.reshape")
    attributes = {
        "scale": node.attributes["scale"].as_float(),
        **{key: node.attributes[key].as_int() for key in ("window", "interleaved", "rounds")},
        "heads": packed.heads,
        "kv_heads": packed.kv_heads,
    }
    outputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in node.outputs]
    made = PACKED_ROLLING_ATTENTION.node([projected, *node.inputs[3:]], attributes, outputs)
    made.name = node.name
    made.metadata_props.update(node.metadata_props)
    names = [v.name for v in node.outputs]
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [reshape, made], list(node.outputs), outputs)
    for value, known_as in zip(outputs, names, strict=True):
        value.name = known_as
    declare_op(model, PACKED_ROLLING_ATTENTION, attributes, str(node.name))
