"""One product for all linear layers that read the same rows: queries, keys and values; gate and up.

    x · Wqᵀ, x · Wkᵀ, x · Wvᵀ   =   Split(x · [Wq; Wk; Wv]ᵀ)

The same numbers, since each row of a weight makes its own column of the result. One large product runs faster than
three small ones, and an engine does not merge them by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graph_passes.ops.base import DOMAIN
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.stored_matmul import STORED_MATMUL

MERGED = "cierzo.merged"
"""Metadata of the nodes that put weights together: the name of the whole."""


def merge_products(model: ir.Model) -> int:
    """Rewrite `model` in place, weights bound or not; returns how many products were taken together into fewer.

    Products go together when they read the same value and their weights have one type and one form (block size, bits,
    zero points or none).
    """
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in (STORED_MATMUL.name, QUANTIZED_MATMUL.name):
            groups.setdefault(_kind(node), []).append(node)
    merged = 0
    for nodes in groups.values():
        if len(nodes) > 1:
            _merge(model, nodes)
            merged += len(nodes)
    return merged


def _kind(node: ir.Node) -> tuple[object, ...]:
    form = tuple(node.attributes[key].as_int() for key in ("bits", "block_size", "K") if key in node.attributes)
    return (node.inputs[0], node.op_type, form, *(None if v is None else v.dtype for v in node.inputs[1:]))


def _merge(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    rows = [_rows(node) for node in nodes]
    weights = []
    made: list[ir.Node] = []
    for index in range(1, len(first.inputs)):
        parts = [node.inputs[index] for node in nodes]
        name = joined_name([str(part.name) for part in parts if part is not None])
        shape = ir.Shape([sum(rows), *list(_shape(parts[0]))[1:]])
        whole = ir.Value(name=name, type=parts[0].type if parts[0] is not None else None, shape=shape)
        node = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", 0)], outputs=[whole], name=f"{name}.concat")
        node.metadata_props[MERGED] = name
        weights.append(whole)
        made.append(node)
    outputs = [node.outputs[0] for node in nodes]
    wide_shape = ir.Shape([*list(_shape(outputs[0]))[:-1], sum(rows)]) if outputs[0].shape is not None else None
    wide = ir.Value(name=joined_name([str(v.name) for v in outputs]), type=outputs[0].type, shape=wide_shape)
    attributes = dict(first.attributes)
    if "N" in attributes:
        attributes["N"] = ir.AttrInt64("N", sum(rows))
    product = ir.Node(
        DOMAIN, first.op_type, [first.inputs[0], *weights], list(attributes.values()), outputs=[wide],
        name=joined_name([str(node.name) for node in nodes]),
    )  # fmt: skip
    product.metadata_props.update(first.metadata_props)
    sizes = _sizes(model, rows)
    parts_out = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in outputs]
    split = ir.Node(
        "", "Split", [wide, sizes], [ir.AttrInt64("axis", -1)], outputs=parts_out, name=f"{wide.name}.split"
    )
    # Before the first of them: the rows are there by then, and no reader of a later one comes earlier. Weights that are
    # made by nodes may be made just before the last one, so these move up with it.
    _make_earlier(model, [v for node in nodes for v in node.inputs[1:] if v is not None], first)
    model.graph.insert_before(first, [*made, product, split])
    names_out = [v.name for v in outputs]
    for old, new in zip(outputs, parts_out, strict=True):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(list(nodes), safe=True)
    for new, known_as in zip(parts_out, names_out, strict=True):
        new.name = known_as


def joined_name(names: Sequence[str]) -> str:
    """What names have in common once, and the rest of each: a.q.w, a.k.w → a.q+k.w."""
    split = [name.split(".") for name in names]
    shortest = min(len(parts) for parts in split) - 1
    head = next((n for n in range(shortest) if len({parts[n] for parts in split}) > 1), shortest)
    tail = next((n for n in range(shortest - head) if len({parts[-1 - n] for parts in split}) > 1), shortest - head)
    middle = "+".join(".".join(parts[head : len(parts) - tail]) for parts in split)
    return ".".join([*split[0][:head], middle, *split[0][len(split[0]) - tail :]])


def _make_earlier(model: ir.Model, values: Sequence[ir.Value], before: ir.Node) -> None:
    """Move the nodes that make `values` out of initializers to before `before`, in their order."""
    order = {node: index for index, node in enumerate(model.graph)}
    late: dict[ir.Node, None] = {}

    def collect(value: ir.Value) -> None:
        maker = value.producer()
        if maker is not None and order[maker] > order[before]:
            for source in maker.inputs:
                if source is not None:
                    collect(source)
            late.setdefault(maker)

    for value in values:
        collect(value)
    for node in late:
        model.graph.remove(node)
        model.graph.insert_before(before, node)


def _rows(node: ir.Node) -> int:
    extent = next(iter(_shape(node.inputs[1])))
    assert isinstance(extent, int)
    return extent


def _shape(value: ir.Value | None) -> ir.Shape:
    assert value is not None
    assert value.shape is not None
    return value.shape


def _sizes(model: ir.Model, rows: Sequence[int]) -> ir.Value:
    """The Split's sizes as an initializer, which all layers share."""
    name = "split_" + "_".join(map(str, rows))
    if name not in model.graph.initializers:
        tensor = ir.tensor(list(rows), dtype=ir.DataType.INT64, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(rows)]), const_value=tensor
        )
        model.graph.register_initializer(value)
    return model.graph.initializers[name]
