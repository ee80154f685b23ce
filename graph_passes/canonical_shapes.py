"""Canonical form of target shapes: said by constants wherever the shapes that are known allow it.

A tracer asks the extents of some tensor, computes with them and joins them again to say how Reshape or Expand should
lay out another. Most of it says only which axes stay as they are; then the region between two values depends on no
third one for its shape, and the arithmetic goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graph_passes.graph import Dim, constant, dims


def state_targets(model: ir.Model) -> bool:
    """Give every Reshape and Expand a constant target where one says the same; whether anything changed."""
    made: dict[tuple[int, ...], ir.Value] = {}
    changed = False
    for node in model.graph:
        if node.domain != "" or node.op_type not in ("Reshape", "Expand"):
            continue
        source, target = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or target.shape is None or constant(node.inputs[1]) is not None:
            continue
        state = _reshape_target if node.op_type == "Reshape" else _expand_target
        stated = state(dims(source), dims(target))
        if stated is not None:
            if stated not in made:
                made[stated] = _initializer(model, stated)
            node.replace_input_with(1, made[stated])
            node.attributes.pop("allowzero", None)  # with it, 0 would be an extent
            changed = True
    return changed


def _reshape_target(source: Sequence[Dim], target: Sequence[Dim]) -> tuple[int, ...] | None:
    """Fixed extents, 0 for an axis that stays in its place, and −1 for at most one that follows from the others."""
    stated = []
    for axis, extent in enumerate(target):
        if isinstance(extent, int):
            stated.append(extent)
        else:
            stated.append(0 if axis < len(source) and source[axis] == extent else -1)
    return tuple(stated) if stated.count(-1) <= 1 and 0 not in _fixed(target) else None


def _expand_target(source: Sequence[Dim], target: Sequence[Dim]) -> tuple[int, ...] | None:
    """Fixed extents, and 1 for an axis that is not widened."""
    aligned = (*(1,) * (len(target) - len(source)), *source)
    stated = []
    for before, after in zip(aligned, target, strict=True):
        if before == after:
            stated.append(1)
        elif isinstance(after, int):
            stated.append(after)
        else:
            return None
    return tuple(stated)


def _fixed(shape: Sequence[Dim]) -> list[int]:
    return [extent for extent in shape if isinstance(extent, int)]


def _initializer(model: ir.Model, extents: tuple[int, ...]) -> ir.Value:
    data = np.array(extents, np.int64)
    name = "shape_" + "_".join(str(extent).replace("-", "m") for extent in extents)
    while name in model.graph.initializers:
        name += "_"
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(data.shape))
    value.const_value = ir.tensor(data, name=name)
    model.graph.register_initializer(value)
    return value
