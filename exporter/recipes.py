"""How the graph makes each parameter out of what is stored: pieces in files, put together, put in order, cast.

The weights of a bundle may lie in the checkpoint's own files, as they were published. A parameter that lies there whole
and in the type that the graph reads is then simply an initializer. Any other gets a recipe, nodes that the fusions
never see, since they are added when the graph is finished:

    pieces (external initializers)  ─ Concat, if several ─ Gather, if rows change places ─ Cast, if need be ─▶ name

Matrices are read as they are stored and need no Cast (`graph_passes.lower.linears`); norms and biases are float32.

An engine may run a recipe when it loads and keep the result, or in every step. Each of its nodes carries the
parameter's name in its metadata, and the last one gives it out under that name, so that tools find parameters as
before: `parameters` lists them whatever they are, and `value_of` reads one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.recipe import Recipe, StoredPiece
from graph_passes.lower.formats import TYPES, LinearFormat, Stored
from graph_passes.unbound import UnboundWeight
from reference.checkpoint import Checkpoint
from reference.weight_source import WeightSource, half_split_order
from runtime.errors import TraceError

PARAMETER = "cierzo.parameter"
"""Metadata of a recipe's nodes: the parameter that they make."""


def referenced(checkpoint: Checkpoint, sources: Mapping[str, WeightSource], names: Mapping[Path, str]) -> list[Recipe]:
    """Recipes that read the checkpoint's own files, which the graph knows under `names`."""
    return [
        Recipe(parameter, source.shape, tuple(_pieces(checkpoint, source, names)), source.pairs_of_head)
        for parameter, source in sources.items()
    ]


def _pieces(checkpoint: Checkpoint, source: WeightSource, names: Mapping[Path, str]) -> Iterator[StoredPiece]:
    for piece in source.pieces:
        entry = checkpoint.tensors[piece.tensor]
        itemsize = TYPES[entry.dtype].itemsize
        offset = entry.offset + int(piece.begin * itemsize)
        yield StoredPiece(names[entry.file], offset, int((piece.end - piece.begin) * itemsize), entry.dtype)


def stored_formats(recipes: Sequence[Recipe]) -> dict[str, LinearFormat]:
    """How a graph reads the matrices among the parameters that these recipes make."""
    return {recipe.parameter: Stored(recipe.dtype) for recipe in recipes if len(recipe.shape) > 1}


def bind_weights(model: ir.Model, recipes: Sequence[Recipe]) -> None:
    """Give every unbound weight of `model` its recipe.

    Raises TraceError when the graph and the recipes do not name exactly the same parameters.
    """
    unbound = {name: v for name, v in model.graph.initializers.items() if isinstance(v.const_value, UnboundWeight)}
    by_name = {recipe.parameter: recipe for recipe in recipes}
    if unbound.keys() != by_name.keys():
        odd = sorted(unbound.keys() ^ by_name.keys())
        raise TraceError(f"The graph and the checkpoint do not have the same parameters; {len(odd)} differ: {odd[:5]}.")
    readers = first_readers(model, unbound.values())
    for name, value in unbound.items():
        assert value.shape is not None
        if tuple(value.shape) != by_name[name].shape:
            raise TraceError(
                f"{name} is {list(value.shape)} in the graph and {list(by_name[name].shape)} in the files."
            )
        if value.dtype != TYPES[by_name[name].dtype]:
            raise TraceError(f"{name} is {value.dtype} in the graph and {by_name[name].dtype} in the files.")
        _bind(model, value, by_name[name], readers.get(value))


def first_readers(model: ir.Model, values: Any) -> dict[ir.Value, ir.Node]:
    """The first node that reads each of `values`: a recipe stands before it, so that it runs as late as it may."""
    wanted = set(values)
    found: dict[ir.Value, ir.Node] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value in wanted:
                found.setdefault(value, node)
    return found


def _bind(model: ir.Model, value: ir.Value, recipe: Recipe, reader: ir.Node | None) -> None:
    name = recipe.parameter
    if recipe.is_plain:
        value.const_value = _external(recipe.pieces[0], name, recipe.shape)
        return
    if reader is None:
        raise TraceError(f"The graph has the parameter {name} and no node that reads it.")
    chain = _Chain(model, name)
    rows = recipe.shape[0] // len(recipe.pieces)
    shape = (rows, *recipe.shape[1:])
    several = len(recipe.pieces) > 1
    made = [
        chain.initializer(
            _external(piece, f"{name}.stored.{number}" if several else f"{name}.stored", shape), TYPES[piece.dtype]
        )
        for number, piece in enumerate(recipe.pieces)
    ]
    target = TYPES[recipe.dtype]
    if len({piece.dtype for piece in recipe.pieces}) > 1:  # Concat takes one type only
        made = [
            chain.node("Cast", [part], f"{name}.cast.{number}", ir.DataType.FLOAT, shape, to=ir.DataType.FLOAT)
            for number, part in enumerate(made)
        ]
    whole = made[0]
    if several:
        whole = chain.node("Concat", made, f"{name}.stacked", _dtype(made[0]), recipe.shape, axis=0)
    if recipe.pairs_of_head is not None:
        order = _order(model, recipe.shape[0], recipe.pairs_of_head)
        whole = chain.node("Gather", [whole, order], f"{name}.reordered", _dtype(whole), recipe.shape, axis=0)
    if _dtype(whole) != target:
        whole = chain.node("Cast", [whole], f"{name}.cast", target, recipe.shape, to=target)
    replace_parameter(model, value, whole, chain.nodes, reader)


def replace_parameter(
    model: ir.Model, value: ir.Value, made: ir.Value, nodes: Sequence[ir.Node], reader: ir.Node
) -> None:
    """Put the recipe `nodes` before `reader`, and the value `made` that they give in the place of `value`."""
    name = str(value.name)
    model.graph.initializers.pop(name)
    ir.convenience.replace_all_uses_with(value, made)
    made.name = name
    model.graph.insert_before(reader, nodes)


class _Chain:
    """Collects the nodes of one recipe."""

    def __init__(self, model: ir.Model, parameter: str) -> None:
        self._model, self._parameter = model, parameter
        self.nodes: list[ir.Node] = []

    def initializer(self, tensor: ir.ExternalTensor, dtype: ir.DataType) -> ir.Value:
        value = ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
        self._model.graph.register_initializer(value)
        return value

    def node(
        self, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: tuple[int, ...], **attribute: int
    ) -> ir.Value:
        made = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        attributes = [ir.AttrInt64(key, int(number)) for key, number in attribute.items()]
        node = ir.Node("", op, inputs, attributes, outputs=[made], name=f"{name}.node")
        node.metadata_props[PARAMETER] = self._parameter
        self.nodes.append(node)
        return made


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _external(piece: StoredPiece, name: str, shape: tuple[int, ...]) -> ir.ExternalTensor:
    dtype = TYPES[piece.dtype]
    if piece.nbytes != int(math.prod(shape) * dtype.itemsize):
        raise TraceError(f"{name} takes {math.prod(shape):,} elements and has {piece.nbytes:,} bytes of {piece.dtype}.")
    return ir.ExternalTensor(piece.location, piece.offset, piece.nbytes, dtype, shape=ir.Shape(shape), name=name)


def _order(model: ir.Model, rows: int, head_dim: int) -> ir.Value:
    """The rows' new order as an initializer, which all projections of one size share. int64 [rows]"""
    name = f"half_split_order.{rows}.{head_dim}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.array(half_split_order(rows, head_dim), np.int64), name=name)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([rows]), const_value=tensor)
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def is_recipe(node: ir.Node) -> bool:
    """Whether `node` makes a parameter out of stored pieces."""
    return PARAMETER in node.metadata_props


def parameters(model: ir.Model) -> dict[str, ir.Value]:
    """Every parameter by its name: an initializer, or what the last node of a recipe gives out."""
    made = {
        str(value.name): value
        for node in model.graph
        if is_recipe(node)
        for value in node.outputs
        if value.name == node.metadata_props[PARAMETER]
    }
    stored = {str(v.name) for node in model.graph if is_recipe(node) for v in node.inputs if v is not None}
    return {name: v for name, v in model.graph.initializers.items() if name not in stored} | made


def value_of(value: ir.Value) -> npt.NDArray[Any]:
    """What a parameter, or a step of its recipe, holds: the computation of the recipe's nodes, in numpy."""
    node = value.producer()
    if node is None:
        assert value.const_value is not None, value.name
        return np.asarray(value.const_value.numpy())
    inputs = [value_of(v) for v in node.inputs if v is not None]
    if node.op_type == "Concat":
        return np.concatenate(inputs, axis=0)
    if node.op_type == "Gather":
        return np.take(inputs[0], inputs[1], axis=0)
    assert node.op_type == "Cast", node.op_type
    return inputs[0].astype(np.float32)


def nodes_of(value: ir.Value) -> list[ir.Node]:
    """The recipe's nodes that make `value`, in their order; none for an initializer."""
    node = value.producer()
    if node is None or not is_recipe(node):
        return []
    before = [inner for v in node.inputs if v is not None for inner in nodes_of(v)]
    return [*dict.fromkeys(before), node]


def graft(model: ir.Model, value: ir.Value, parameter: ir.Value, reader: ir.Node) -> None:
    """Give the unbound weight `value` of `model` the recipe that `parameter` has in another graph."""
    nodes = nodes_of(parameter)
    if not nodes:
        value.const_value = parameter.const_value
        return
    mapping: dict[ir.Value, ir.Value] = {}

    def mapped(old: ir.Value | None) -> ir.Value:
        assert old is not None
        if old not in mapping:
            name = str(old.name)
            if name not in model.graph.initializers:
                model.graph.register_initializer(
                    ir.Value(name=name, type=old.type, shape=old.shape, const_value=old.const_value)
                )
            mapping[old] = model.graph.initializers[name]
        return mapping[old]

    copies = []
    for node in nodes:
        (old,) = node.outputs
        made = ir.Value(name=f"{old.name}.grafted" if old is parameter else old.name, type=old.type, shape=old.shape)
        copy = ir.Node(
            "", node.op_type, [mapped(v) for v in node.inputs], list(node.attributes.values()),
            outputs=[made], name=node.name,
        )  # fmt: skip
        copy.metadata_props.update(node.metadata_props)
        mapping[old] = made
        copies.append(copy)
    replace_parameter(model, value, mapping[parameter], copies, reader)
