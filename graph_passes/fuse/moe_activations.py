"""The activations inside the experts' region: where each begins and ends, and that all of them are one function.

A spelling may hold one for all experts, one for each choice, or one for each expert of a loop. Each is the largest
piece of elementwise operators around functions such as Sigmoid that depends on one product alone; it is recognised by
running that piece.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.fuse.activation import activation_between
from graph_passes.fuse.moe_region import FUNCTIONS, Area
from graph_passes.fuse.walk import cone
from graph_passes.graph import Refusal, constant, dims, scalar

_ELEMENTWISE = FUNCTIONS | {"Mul", "Add", "Sub", "Div", "Neg", "Where", "Sum"}
_MOST_AXES = 4


def find_activation(model: ir.Model, area: Area) -> tuple[str, frozenset[ir.Value]]:
    """(name, matrices that lie behind the activated values) of the region.

    Raises Refusal when there is none, when one depends on more than one product, or when they are not all the same.
    """
    functions = [node for node in area.nodes if node.op_type in FUNCTIONS]
    if not functions:
        raise Refusal("no activation lies between the experts' matrices", area.y.producer())
    inside = set(area.nodes)
    sources: dict[ir.Value, list[ir.Node]] = {}
    for node in functions:
        sources.setdefault(_source(node, area, inside), []).append(node)
    names: dict[str, ir.Node] = {}
    gates: set[ir.Value] = set()
    for source, nodes in sources.items():
        if len(dims(source)) > _MOST_AXES or not dims(source):
            raise Refusal(f"the activation works on {len(dims(source))} axes", nodes[0])
        behind = _matrices_behind(source, area)
        if not behind:
            raise Refusal(
                f"{nodes[0].op_type} changes {source.name!r}, which is no product with the matrices", nodes[0]
            )
        active = _active(source, inside)
        names.setdefault(activation_between(model, source, active), nodes[0])
        gates |= behind
    if len(names) > 1:
        raise Refusal(f"the experts have several activations: {', '.join(sorted(names))}", next(iter(names.values())))
    return next(iter(names)), frozenset(gates)


def _source(function: ir.Node, area: Area, inside: set[ir.Node]) -> ir.Value:
    """The one value, no elementwise result itself, that `function` is computed from."""
    ends: dict[ir.Value, ir.Node] = {}
    seen, front = set[ir.Value](), [(v, function) for v in function.inputs if v is not None]
    while front:
        value, reader = front.pop(0)
        if value in seen or constant(value) is not None:
            continue
        seen.add(value)
        node = value.producer()
        if node is None or node not in inside or node.op_type not in _ELEMENTWISE or _is_gating(node):
            ends[value] = reader
        else:
            front.extend((v, node) for v in node.inputs if v is not None)
    if len(ends) == 1:
        return next(iter(ends))
    if not ends:
        raise Refusal(f"{function.op_type} depends on nothing but constants", function)
    for value, reader in ends.items():
        shape = list(dims(value))
        if reader.op_type in ("Add", "Sub", "Sum"):
            listed = ", ".join(repr(str(v.name)) for v in ends)
            raise Refusal(f"the activation depends on the sum of {listed} (a bias? {value.name!r} is {shape})", reader)
    listed = ", ".join(repr(str(v.name)) for v in ends)
    raise Refusal(f"the activation depends on {listed}, but must depend on one product", function)


def _is_gating(node: ir.Node) -> bool:
    """A Mul of two values that are not constant and not one a function of the other: never part of an activation."""
    return False if node.op_type != "Mul" else not _related(node)


def _related(node: ir.Node) -> bool:
    left, right = node.inputs[0], node.inputs[1]
    if left is right or scalar(left) is not None or scalar(right) is not None:
        return True
    return left is not None and right is not None and bool(_roots(left) & _roots(right))


def _active(source: ir.Value, inside: set[ir.Node]) -> ir.Value:
    """The last value that is an elementwise function of `source` alone and that others read."""
    made, last = {source}, list[ir.Value]()
    grown = True
    front = [source]
    while grown:
        grown = False
        for value in list(front):
            for use in value.uses():
                node = use.node
                if node not in inside or node.op_type not in _ELEMENTWISE or node.outputs[0] in made:
                    continue
                if any((data := constant(v)) is not None and data.size > 1 for v in node.inputs):
                    raise Refusal("the activation is not the same function of every element (a bias?)", node)
                if all(v is None or v in made or scalar(v) is not None for v in node.inputs):
                    made.add(node.outputs[0])
                    front.append(node.outputs[0])
                    grown = True
    for value in made - {source}:
        if value.is_graph_output() or any(use.node.outputs[0] not in made for use in value.uses()):
            last.append(value)
    if len(last) != 1:
        raise Refusal(f"the activation of {source.name!r} has {len(last)} results", source.producer())
    if any(use.node.outputs[0] not in made for use in source.uses()):
        raise Refusal(
            f"{source.name!r} is activated and also read as it is; gate and up must differ", source.producer()
        )
    return last[0]


def _matrices_behind(source: ir.Value, area: Area) -> set[ir.Value]:
    found, front, seen = set[ir.Value](), [source], set[ir.Value]()
    while front:
        value = front.pop()
        if value in seen or value not in area.inside:
            continue
        seen.add(value)
        if value in area.matrices:
            found.add(value)
            continue
        node = value.producer()
        if node is not None and node in area.nodes:
            front.extend(v for v in node.inputs if v is not None)
    return found


def _roots(value: ir.Value) -> set[ir.Value]:
    """What `value` is an elementwise function of."""
    return set(cone(value, _ELEMENTWISE).ends)
