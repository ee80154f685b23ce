"""Values that hold [B, H, T, D] in another layout, as operands that bring it into order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.driver_types import Adapted, Operand
from graph_passes.graph import Dim

_ORDERS = [order for order in itertools.permutations((0, 1, 2, 3)) if order[0] == 0]


def heads_first(value: ir.Value, shape: tuple[Dim, ...]) -> Iterator[Operand]:
    """The ways to see `value` as four axes with the rows first: as it is, turned, or with two fixed axes joined."""
    if len(shape) == 4:
        yield value
        yield from (_adapted(value, shape, None, order) for order in _ORDERS[1:])
    elif len(shape) == 5:
        for axis in (1, 2, 3):
            outer, inner, after = shape[axis], shape[axis + 1], shape[axis + 2 :]
            if isinstance(outer, int) and isinstance(inner, int) and sum(not isinstance(d, int) for d in after) <= 1:
                yield from (_adapted(value, shape, axis, order) for order in _ORDERS)


def _adapted(value: ir.Value, shape: tuple[Dim, ...], joined: int | None, order: Sequence[int]) -> Adapted:
    four = shape
    if joined is not None:
        outer, inner = shape[joined], shape[joined + 1]
        assert isinstance(outer, int)
        assert isinstance(inner, int)
        four = (*shape[:joined], outer * inner, *shape[joined + 2 :])
    turned = tuple(four[axis] for axis in order)
    how = "transposed" if joined is None else "heads joined"
    dtype = value.dtype or ir.DataType.FLOAT
    return Adapted(value, dtype, turned, _build(four, joined, order), _undo(shape, joined, order), how)


def _build(four: tuple[Dim, ...], joined: int | None, order: Sequence[int]) -> Callable[[ir.Value], Sequence[ir.Node]]:
    def build(source: ir.Value) -> list[ir.Node]:
        nodes: list[ir.Node] = []
        if joined is not None:
            # 0 keeps an axis that stands where it stood; behind the joined ones at most one extent is open.
            sizes = [
                0 if axis < joined else extent if isinstance(extent, int) else -1 for axis, extent in enumerate(four)
            ]
            shape = ir.node("Constant", [], {"value_ints": sizes})
            nodes += [shape, ir.node("Reshape", [source, shape.outputs[0]])]
        if list(order) != [0, 1, 2, 3]:
            source = nodes[-1].outputs[0] if nodes else source
            nodes.append(ir.node("Transpose", [source], {"perm": list(order)}))
        return nodes

    return build


def _undo(
    shape: tuple[Dim, ...], joined: int | None, order: Sequence[int]
) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    def undo(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        array = array.transpose(np.argsort(order))
        if joined is not None:
            array = array.reshape(*array.shape[:joined], *shape[joined : joined + 2], *array.shape[joined + 1 :])
        return array

    return undo
