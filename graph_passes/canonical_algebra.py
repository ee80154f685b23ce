"""Canonical form of angle tables: what is computed twice as wide is computed once and repeated.

Rotary embeddings are often fed cosines [B, T, D] whose two halves, or whose neighbours, are equal: made by joining the
frequencies with themselves, by repeating each, or by reading a table that was widened when the model was built. Here
the elementwise functions come before the repetition, so that the half [B, T, D/2] is a value of the graph. Every
rewrite is exact: it moves a function of single elements past an operator that only moves elements, or splits a
constant whose halves were compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.graph import constant, dims, integer_attribute, is_made_by, scalar

_ANGULAR = ("Cos", "Sin")
"""Functions that are moved past every rearrangement; the others only past a repetition."""

_ELEMENTWISE = (*_ANGULAR, "Cast", "Neg", "Mul", "Div")
_LONGEST_CHAIN = 6
"""Rearrangements in a row that are looked at, so that the work stays linear in the size of the graph."""

_LARGEST_TABLE = 1 << 26
"""Elements of a constant up to which its halves are compared; a table of a million positions is within it."""

Repeat = Callable[[ir.Value, ir.Node], list[ir.Node]]
"""The nodes, standing before the given one, that widen a half again; the last one's only output is the full width."""


def repeat_after_functions(model: ir.Model) -> bool:
    """Bring every widened angle table into the form function first, repetition last; whether anything changed."""
    changed = False
    halves: dict[ir.Value, tuple[ir.Value, Repeat] | None] = {}
    moved: set[ir.Value] = set()
    for node in list(model.graph):
        if node.domain != "" or len(node.outputs) != 1:
            continue
        if _split_table(model, node, halves):
            changed = True
        elif node.op_type in _ELEMENTWISE and (chain := _chain(node, moved)):
            moved.add(_move(model, node, chain))
            changed = True
    return changed


def _subject(node: ir.Node) -> int | None:
    """Which input an elementwise function is a function of, the other being one number; None when it is no such."""
    if node.op_type not in ("Mul", "Div"):
        return 0 if node.inputs[0] is not None else None
    for index, other in ((0, 1), (1, 0)):
        factor = node.inputs[other]
        if scalar(factor) is not None and not dims_of(factor) and (node.op_type == "Mul" or index == 0):
            return index
    return None


def dims_of(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a constant; a number has none."""
    data = constant(value)
    return () if data is None else data.shape


def _chain(node: ir.Node, moved: set[ir.Value]) -> list[ir.Node]:
    """The rearrangements behind the function `node`, nearest first, past which it should be moved; empty for none."""
    index = _subject(node)
    if index is None:
        return []
    value = node.inputs[index]
    known = value in moved
    chain: list[ir.Node] = []
    deepest = 0
    while value is not None and len(chain) < _LONGEST_CHAIN:
        maker = value.producer()
        if maker is None or maker.domain != "" or not _only_moves(maker):
            break
        chain.append(maker)
        if maker.op_type == "Concat" or known or node.op_type in _ANGULAR:
            deepest = len(chain)
        value = maker.inputs[0]
    return chain[:deepest]


def _only_moves(node: ir.Node) -> bool:
    """Whether every element of the output is an element of the first input, all at its own places."""
    if node.op_type == "Concat":
        return len(node.inputs) > 1 and all(value is node.inputs[0] for value in node.inputs)
    return node.op_type in ("Unsqueeze", "Reshape", "Expand", "Transpose")


def _move(model: ir.Model, node: ir.Node, chain: Sequence[ir.Node]) -> ir.Value:
    """Put `node` before its chain; returns the value that takes the place of its output."""
    base, index = chain[-1].inputs[0], _subject(node)
    assert base is not None
    assert index is not None
    dtype = node.outputs[0].dtype
    inputs = [base if place == index else value for place, value in enumerate(node.inputs)]
    made = [_like(node, inputs, dtype, base.shape)]
    for link in reversed(chain):
        value = made[-1].outputs[0]
        again = [value if old is link.inputs[0] else old for old in link.inputs]
        made.append(_like(link, again, dtype, link.outputs[0].shape))
    _replace(model, node, made)
    return made[-1].outputs[0]


def _like(
    node: ir.Node, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None, shape: ir.Shape | None
) -> ir.Node:
    """A copy of `node` with other inputs."""
    new = ir.Node("", node.op_type, inputs, node.attributes.values(), num_outputs=1)
    new.metadata_props.update(node.metadata_props)
    if dtype is not None:
        new.outputs[0].type = ir.TensorType(dtype)
    new.outputs[0].shape = shape
    return new


def _replace(model: ir.Model, node: ir.Node, made: Sequence[ir.Node]) -> None:
    """Put `made` in the place of `node`; the last one's output takes over its name."""
    old, new = node.outputs[0], made[-1].outputs[0]
    name = str(old.name)
    for number, other in enumerate(made):
        other.name = f"{node.name}__moved_{number}"
        other.outputs[0].name = f"{name}__moved_{number}"
    model.graph.insert_before(node, made)
    old.name, new.name = f"{name}__before", name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _split_table(model: ir.Model, node: ir.Node, halves: dict[ir.Value, tuple[ir.Value, Repeat] | None]) -> bool:
    """Read half of a widened constant: a table looked up by position, or frequencies times positions [..., 1]."""
    place = _table_place(node)
    table = node.inputs[place] if place is not None else None
    if table is None or place is None:
        return False
    if table not in halves:
        halves[table] = _halved(model, table)
    half = halves[table]
    if half is None:
        return False
    shape = node.outputs[0].shape
    assert shape is not None  # _table_place saw to it
    narrow = ir.Shape([*shape[:-1], dims(half[0])[-1]])
    inputs = [half[0] if index == place else value for index, value in enumerate(node.inputs)]
    first = _like(node, inputs, node.outputs[0].dtype, narrow)
    made = [first, *half[1](first.outputs[0], node)]
    _replace(model, node, made)
    return True


def _table_place(node: ir.Node) -> int | None:
    """The input of `node` that is a constant whose last axis is that of the output; None when there is none."""
    if node.outputs[0].shape is None or any(value is None or not _extents(value) for value in node.inputs[:2]):
        return None  # the repeat of what was read has to name its axes
    if node.op_type in ("Gather", "GatherND") and node.inputs[0] is not None and node.inputs[1] is not None:
        if len(_extents(node.inputs[0])) != 2:
            return None
        if node.op_type == "Gather":
            return 0 if integer_attribute(node, "axis", 0) == 0 else None
        single = node.inputs[1].shape is not None and dims(node.inputs[1])[-1] == 1
        return 0 if single and integer_attribute(node, "batch_dims", 0) == 0 else None
    if node.op_type == "Mul" and any(use.node.op_type in _ANGULAR for use in node.outputs[0].uses()):
        for index, other in ((0, 1), (1, 0)):
            positions = node.inputs[other]
            if positions is not None and positions.shape is not None and dims(positions)[-1:] == (1,):
                return index
    return None


def _extents(value: ir.Value) -> tuple[object, ...]:
    return () if value.shape is None else tuple(value.shape)


def _halved(model: ir.Model, table: ir.Value) -> tuple[ir.Value, Repeat] | None:
    """The half of a constant whose halves, or whose neighbours, are equal, and how to widen what is read from it."""
    extents = _extents(table)
    width = extents[-1] if extents else None
    if not isinstance(width, int) or width < 2 or width % 2 or table.dtype != ir.DataType.FLOAT:
        return None
    if table.const_value is None or table.const_value.size > _LARGEST_TABLE:
        return None
    data = constant(table)
    if data is None:
        return None
    if np.array_equal(data[..., : width // 2], data[..., width // 2 :]):
        return _register(model, table, data[..., : width // 2]), _beside_itself
    if np.array_equal(data[..., ::2], data[..., 1::2]):
        return _register(model, table, data[..., ::2]), _each_twice
    return None


def _register(model: ir.Model, table: ir.Value, data: npt.NDArray[np.generic]) -> ir.Value:
    half = ir.Value(name=f"{table.name}__half", type=table.type, shape=ir.Shape(data.shape))
    half.const_value = ir.tensor(np.ascontiguousarray(data), name=half.name)
    model.graph.register_initializer(half)
    return half


def _beside_itself(half: ir.Value, node: ir.Node) -> list[ir.Node]:
    """(c, c) along the last axis."""
    return [_joined(half, node, node.outputs[0].shape)]


def _each_twice(half: ir.Value, node: ir.Node) -> list[ir.Node]:
    """c₀ c₀ c₁ c₁ … along the last axis."""
    shape = node.outputs[0].shape
    rank, width = len(shape or ()), dims(half)[-1]
    axes, target = np.array([rank], np.int64), np.array([0] * (rank - 1) + [2 * int(width)], np.int64)
    graph = node.graph
    assert graph is not None
    operands = []
    for role, data in (("axes", axes), ("target", target)):
        value = ir.Value(name=f"{node.outputs[0].name}__{role}", type=ir.TensorType(ir.DataType.INT64))
        value.shape, value.const_value = ir.Shape(data.shape), ir.tensor(data, name=value.name)
        assert isinstance(graph, ir.Graph)
        graph.register_initializer(value)
        operands.append(value)
    narrow = list(half.shape) if half.shape is not None else []
    column = ir.node("Unsqueeze", [half, operands[0]])
    column.outputs[0].type, column.outputs[0].shape = half.type, ir.Shape([*narrow, 1])
    pair = _joined(column.outputs[0], node, ir.Shape([*narrow, 2]))
    flat = ir.node("Reshape", [pair.outputs[0], operands[1]])
    flat.outputs[0].type, flat.outputs[0].shape = half.type, shape
    return [column, pair, flat]


def _joined(value: ir.Value, node: ir.Node, shape: ir.Shape | None) -> ir.Node:
    """`value` with itself along its last axis."""
    rank = len(value.shape or ())
    join = ir.node("Concat", [value, value], {"axis": rank - 1})
    join.metadata_props.update(node.metadata_props)
    join.outputs[0].type, join.outputs[0].shape = value.type, shape
    return join


def multiplies_by_one(node: ir.Node) -> int | None:
    """The input that a Mul or Div by ones hands on unchanged; None when there is none."""
    if node.op_type not in ("Mul", "Div") or node.outputs[0].shape is None:
        return None
    for index, other in ((0, 1), (1, 0)):
        value, factor = node.inputs[index], node.inputs[other]
        if value is None or factor is None or value.shape is None or (node.op_type == "Div" and index == 1):
            continue
        if _is_one(factor) and value.dtype == factor.dtype and dims(value) == dims(node.outputs[0]):
            return index
    return None


def _is_one(value: ir.Value) -> bool:
    """Whether a constant, or what Expand fills, is all ones."""
    if is_made_by(value, "Expand"):
        maker = value.producer()
        return maker is not None and scalar(maker.inputs[0]) == 1.0
    return scalar(value) == 1.0


def undoes_transpose(node: ir.Node) -> ir.Value | None:
    """What a Transpose of a Transpose restores to its own order; None when the order stays another."""
    order = _order(node)
    before = node.inputs[0]
    if order is None or before is None:
        return None
    if order == [*range(len(order))]:
        return before
    maker = before.producer()
    inner = _order(maker) if maker is not None and is_made_by(before, "Transpose") else None
    if maker is None or inner is None or [inner[axis] for axis in order] != [*range(len(order))]:
        return None
    return maker.inputs[0]


def _order(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("perm")
    return [*attribute.as_ints()] if attribute is not None else None
