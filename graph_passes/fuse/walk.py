"""Walks through nodes whose effect is known, and the values at which an op could begin or end.

A matcher starts at an anchor of unmistakable meaning and walks outwards. It passes only nodes on a whitelist:
rearrangements (each element of the result is an element of the source), constant factors, and the products that the
matcher names itself. What lies between is then a linear form in each of its inputs, and two such forms that agree on
random inputs are equal with probability one; so the proof decides which of the collected values are the borders, and
the spelling does not matter. A node that is not on the list ends the walk and is named in the refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.graph import Dim, Refusal, constant, dims, integer_attribute, scalar

REARRANGEMENTS = frozenset(
    {"Transpose", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "Expand", "Tile", "Identity", "Cast"}
    | {"Slice", "Split", "Gather", "GatherElements", "GatherND", "Concat"}
)
"""Operators that copy elements: which go where depends on shapes and constants alone. A walk passes those that are
`uniform`."""

_INDEXED = frozenset({"Gather", "GatherElements", "GatherND"})

FACTORS = frozenset(("Mul", "Div", "Neg"))
"""Operators that may multiply by a constant number."""


def uniform(node: ir.Node) -> bool:
    """Whether a rearrangement does at every size what it does at one, and keeps float32; any other operator does.

    A cut along an open axis does not: [:512] leaves a short axis whole and a long one not. Nor does a constant of which
    as much is taken as some size asks for. The examples of a proof are short, and would not tell. Neither would a cast
    to a narrower type: where ONNX Runtime has no kernel for it, it computes in float32 and drops the rounding.
    """
    if node.op_type not in REARRANGEMENTS or not node.inputs:
        return True
    first = node.inputs[0]
    if node.op_type == "Cast":
        target = ir.DataType(integer_attribute(node, "to", ir.DataType.FLOAT.value))
        return first is not None and not (_is_float(first) and target.is_floating_point() and target.bitwidth < 32)
    if node.op_type not in ("Slice", "Split", *_INDEXED):
        return True
    if node.op_type in _INDEXED and constant(node.inputs[1]) is None:
        return True  # what is chosen is data, which the caller follows
    if first is None or first.shape is None or node.outputs[0].shape is None:
        return False
    before, after = dims(first), dims(node.outputs[0])
    if node.op_type in ("Gather", "GatherND"):
        return all(isinstance(extent, int) for extent in _looked_up_axes(node, before))
    return len(before) == len(after) and all(
        old == new or (isinstance(old, int) and isinstance(new, int)) for old, new in zip(before, after, strict=True)
    )


def _looked_up_axes(node: ir.Node, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The extents of the axes along which a Gather or GatherND with constant indices looks up."""
    if node.op_type == "Gather":
        return shape[integer_attribute(node, "axis", 0) :][:1]
    indices, first = constant(node.inputs[1]), integer_attribute(node, "batch_dims", 0)
    return shape[first : first + (indices.shape[-1] if indices is not None else len(shape))]


@dataclass(frozen=True, slots=True)
class Step:
    """A value on a walk back, and the constant number that lies between it and the walk's beginning.

    The beginning is `factor` times a rearrangement of `value`.
    """

    value: ir.Value
    factor: float


def back(value: ir.Value) -> list[Step]:
    """`value` and what it is a rearrangement or constant multiple of, nearest first, to the first node that is neither.

    A Concat goes on where it joins one value with itself; a Gather where its indices are constant.
    """
    steps = [Step(value, 1.0)]
    while (step := source(steps[-1].value)) is not None:
        steps.append(Step(step.value, steps[-1].factor * step.factor))
    return steps


def source(value: ir.Value) -> Step | None:
    """The value of which `value` is a rearrangement or constant multiple; None when it is something else.

    None as well where that value is a constant: there is no data behind it.
    """
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in REARRANGEMENTS:
        found = _copied(node)
        return None if found is None or constant(found) is not None else Step(found, 1.0)
    return _multiplied(node) if node.op_type in FACTORS else None


def _copied(node: ir.Node) -> ir.Value | None:
    first = node.inputs[0]
    if not uniform(node):
        return None
    if node.op_type == "Concat":
        return first if all(v is first for v in node.inputs) else None
    if node.op_type in _INDEXED and constant(node.inputs[1]) is None:
        return None
    if first is not None and node.op_type == "Cast" and not _is_float(first):
        return None
    return first


def _multiplied(node: ir.Node) -> Step | None:
    left = node.inputs[0]
    right = node.inputs[1] if len(node.inputs) > 1 else None
    if left is None or not _is_float(left):
        return None
    if node.op_type == "Neg":
        return Step(left, -1.0)
    if right is not None and (factor := scalar(right)) is not None:
        if node.op_type == "Mul":
            return Step(left, factor)
        return Step(left, 1 / factor) if factor else None
    if right is not None and node.op_type == "Mul" and (factor := scalar(left)) is not None:
        return Step(right, factor)
    return None


def forward(value: ir.Value) -> list[ir.Value]:
    """`value` and what is made of it by rearrangement, as far as each has one reader; nearest first.

    The last one's readers are the caller's to look at.
    """
    values = [value]
    while (reader := only_reader(values[-1])) is not None:
        last = values[-1]
        if reader.domain != "" or reader.op_type not in REARRANGEMENTS or _copied(reader) is not last:
            break
        if len(reader.outputs) != 1:
            break
        values.append(reader.outputs[0])
    return values


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, or None when there is none, or more, or the graph itself returns it."""
    readers = {use.node for use in value.uses()}
    return readers.pop() if len(readers) == 1 and not value.is_graph_output() else None


@dataclass(frozen=True, slots=True)
class Cone:
    """What lies behind a value within a whitelist.

    values: all that were passed, the beginning included, nearest first; ends: those of them whose producer is not on
    the list (or that have none), in the same order. Constants are neither.
    """

    values: tuple[ir.Value, ...]
    ends: tuple[ir.Value, ...]


def cone(value: ir.Value, allowed: Collection[str], *, stop: Callable[[ir.Value], bool] | None = None) -> Cone:
    """Everything behind `value` that is reached through standard operators in `allowed`, rearrangements if `uniform`.

    stop: values at which the walk ends even though their producer is allowed. Of a rearrangement only the data are
    followed, not what gives it its shape, axes or bounds.
    """
    values: list[ir.Value] = []
    ends: list[ir.Value] = []
    queue, seen = [value], {value}
    while queue:
        current = queue.pop(0)
        values.append(current)
        node = current.producer()
        known = node is not None and node.domain in ("", "ai.onnx") and node.op_type in allowed
        if node is None or not known or not uniform(node) or (stop is not None and stop(current)):
            ends.append(current)
            continue
        for behind in data_inputs(node):
            if behind not in seen and constant(behind) is None:
                seen.add(behind)
                queue.append(behind)
    return Cone(tuple(values), tuple(ends))


def data_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs that the result's elements depend on: without shapes, axes and bounds, with indices that are data."""
    indexed = node.op_type in _INDEXED
    only_first = node.op_type in REARRANGEMENTS and node.op_type != "Concat" and not indexed
    for value in node.inputs[:1] if only_first else node.inputs:
        if value is not None:
            yield value


def unexpected(value: ir.Value, expected: str) -> Refusal:
    """The refusal of a walk that ended at `value`, where `expected` was needed; it names the node found instead."""
    node = value.producer()
    found = f"comes from {node.op_type}" if node is not None else "is an input"
    return Refusal(f"{value.name!r} should come from {expected}, but {found}", node)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
