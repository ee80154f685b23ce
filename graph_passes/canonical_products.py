"""Canonical form of products over heads: axes in the order of the factors, and no more of them than are turned.

An Einsum may name its result's axes in any order, and heads may lie on two axes, groups and the heads of a group. Both
hide the value [B, H, T, D] at which attention ends. Here the turning is a Transpose of its own, of four axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graph_passes.graph import Dim, dims, is_made_by, permutation


def order_products(model: ir.Model) -> None:
    """Bring every Einsum and every turned product of five axes into the form above, in place."""
    for node in list(model.graph):
        if node.domain != "" or not node.outputs or node.outputs[0].shape is None:
            continue
        if node.op_type == "Einsum":
            _order_einsum(node)
        elif node.op_type == "Transpose" and is_made_by(node.inputs[0], "MatMul", "Einsum"):
            _join_axes(node)


def _order_einsum(node: ir.Node) -> None:
    """`bhts,bhsd->bthd` becomes `bhts,bhsd->bhtd` and a Transpose, as a MatMul would have it.

    From four axes on: with fewer there are no heads that could stand in two places.
    """
    factors, arrow, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    ordered = "".join(dict.fromkeys(letter for letter in factors if letter in result))
    if not arrow or "." in factors or len(result) < 4 or ordered == result:
        return
    shape = dims(node.outputs[0])
    einsum = ir.node("Einsum", node.inputs, {"equation": f"{factors}->{ordered}"})
    _describe(einsum, node, [shape[result.index(letter)] for letter in ordered])
    turn = ir.node("Transpose", einsum.outputs, {"perm": [ordered.index(letter) for letter in result]})
    _describe(turn, node, shape)
    _replace(node, [einsum, turn])
    if len(result) == 5:
        _join_axes(turn)


def _join_axes(node: ir.Node) -> None:
    """[B, G, R, T, D] turned to [B, T, G, R, D] becomes [B, G·R, T, D] turned to [B, T, G·R, D], between two Reshapes.

    Only two fixed axes that stay side by side, of five, are joined, and only where one open extent is left to work out.
    """
    source, perm = node.inputs[0], permutation(node)
    assert source is not None
    if len(perm) != 5 or source.shape is None:
        return
    shape = dims(source)
    for first in (1, 2, 3):
        outer, inner = shape[first], shape[first + 1]
        place = perm.index(first)
        if not (isinstance(outer, int) and isinstance(inner, int)) or perm[place + 1 : place + 2] != [first + 1]:
            continue
        joined = [*shape[:first], outer * inner, *shape[first + 2 :]]
        order = [axis - (axis > first) for axis in perm if axis != first + 1]
        turned = [joined[axis] for axis in order]
        back: list[Dim] = [*turned[:place], outer, inner, *turned[place + 1 :]]
        sizes, sizes_back = _sizes(joined, first), _sizes(back, place)
        if sizes is None or sizes_back is None:
            continue
        wanted, wanted_back = (ir.node("Constant", [], {"value_ints": ints}) for ints in (sizes, sizes_back))
        join = ir.node("Reshape", [source, wanted.outputs[0]])
        turn = ir.node("Transpose", join.outputs, {"perm": order})
        split = ir.node("Reshape", [turn.outputs[0], wanted_back.outputs[0]])
        for made, extents in ((join, joined), (turn, turned), (split, back)):
            _describe(made, node, extents)
        _replace(node, [wanted, join, turn, wanted_back, split])
        return


def _sizes(shape: Sequence[Dim], kept: int) -> list[int] | None:
    """A Reshape's target: 0 for the axes in front, which stay, then numbers; None when more than one is open."""
    sizes = [0 if axis < kept else extent if isinstance(extent, int) else -1 for axis, extent in enumerate(shape)]
    return sizes if sizes.count(-1) <= 1 else None


def _describe(made: ir.Node, old: ir.Node, shape: Sequence[Dim]) -> None:
    made.outputs[0].type = old.outputs[0].type
    made.outputs[0].shape = ir.Shape(shape)
    made.metadata_props.update(old.metadata_props)


def _replace(node: ir.Node, made: list[ir.Node]) -> None:
    """Put `made` in the place of `node`; the last one's output takes over its name."""
    graph, old, new = node.graph, node.outputs[0], made[-1].outputs[0]
    assert graph is not None
    name = old.name
    for index, each in enumerate(made):
        each.name, each.outputs[0].name = f"{node.name}_{index}", f"{name}_{index}"
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, [old], [new])
    old.name, new.name = f"{name}_elided", name
