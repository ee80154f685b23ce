"""Takes the products of gate and up apart again, which `merge_products` made one.

Each number is the same, and so is how many kernels run; but behind one product a Split has to copy both halves, which
takes a third of what lies between the products of a feed-forward layer when there are many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.lower.ort.rewriting import input_of, is_op, like, shape_of, substitute
from graph_passes.ops.base import DOMAIN
from graph_passes.ops.gated_activation import GATED_ACTIVATION
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.stored_matmul import STORED_MATMUL


@dataclass(frozen=True, slots=True)
class _Merged:
    """A product that only a Split into gate and up reads. weights: each of its weights in two parts."""

    product: ir.Node
    split: ir.Node
    weights: tuple[tuple[ir.Value, ir.Value], ...]


def part_gated_products(model: ir.Model) -> int:
    """Rewrite `model` in place; returns how many products are two now."""
    nodes = [node for node in model.graph if is_op(node, GATED_ACTIVATION.name)]
    found = [merged for node in nodes if (merged := _match(node)) is not None]
    for merged in found:
        _part(model, merged)
    return len(found)


def _match(node: ir.Node) -> _Merged | None:
    sources = [_before_cast(input_of(node, 0)), _before_cast(input_of(node, 1))]
    split = sources[0].producer()
    if split is None or split.domain != "" or split.op_type != "Split" or list(split.outputs) != sources:
        return None
    product = input_of(split, 0).producer()
    if product is None or not is_op(product, STORED_MATMUL.name, QUANTIZED_MATMUL.name):
        return None
    if any(len(list(value.uses())) != 1 for value in (*product.outputs, *sources)):
        return None
    weights = []
    for value in product.inputs[1:]:
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type != "Concat" or maker.attributes["axis"].as_int() != 0:
            return None
        parts = [input_of(maker, index) for index in range(len(maker.inputs))]
        if [shape_of(part)[0] for part in parts] != [shape_of(source)[-1] for source in sources]:
            return None
        weights.append((parts[0], parts[1]))
    return _Merged(product, split, tuple(weights))


def _before_cast(value: ir.Value) -> ir.Value:
    maker = value.producer()
    return input_of(maker, 0) if maker is not None and maker.domain == "" and maker.op_type == "Cast" else value


def _part(model: ir.Model, merged: _Merged) -> None:
    product = merged.product
    for index, old in enumerate(list(merged.split.outputs)):
        attributes = dict(product.attributes)
        if "N" in attributes:
            attributes["N"] = ir.AttrInt64("N", int(str(shape_of(old)[-1])))
        made = like(old, f"{old.name}.parted")
        inputs = [product.inputs[0], *(parts[index] for parts in merged.weights)]
        node = ir.Node(
            DOMAIN, product.op_type, inputs, list(attributes.values()), outputs=[made], name=f"{product.name}.{index}"
        )
        node.metadata_props.update(product.metadata_props)
        model.graph.insert_before(product, node)
        substitute(model, merged.split, old, made)
    model.graph.remove(product, safe=True)
