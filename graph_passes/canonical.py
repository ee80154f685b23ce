"""Canonical form: what the tracer wrote, without the ways in which it happened to write it.

After these passes constants are initializers, equal constants and equal computations exist once, nothing is computed
that could be known, and no node is there that changes nothing. Matchers see only this form.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer

from graph_passes.canonical_algebra import multiplies_by_one, repeat_after_functions, undoes_transpose
from graph_passes.canonical_products import order_products
from graph_passes.canonical_shapes import state_targets
from graph_passes.graph import constant, dims, integers
from graph_passes.unbound import is_unbound

_FOLD_LIMIT = 8192
"""Elements up to which a constant is worked out; shape arithmetic and masks of a few tokens, never a weight."""

_CSE_ROUNDS = 4
"""Enough for the traced decoder, which is stable after two; more would hide a pass that never settles."""


def canonicalise(model: ir.Model) -> None:
    """Bring `model` into canonical form, in place. Weights without data stay untouched."""
    _fold(model)
    state_targets(model)
    share_shape_sources(model)
    order_products(model)
    for _ in range(_CSE_ROUNDS):
        changed = elide_no_ops(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        changed |= repeat_after_functions(model)
        changed |= share_constants(model)
        changed |= common.CommonSubexpressionEliminationPass()(model).modified
        changed |= common.RemoveUnusedNodesPass()(model).modified
        if not changed:
            break
    normalise_axes(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)


def _fold(model: ir.Model) -> None:
    """Work out constants and infer shapes; never touches a node that reads a weight without data."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports every weight that it could not read, which is all of them
    try:
        onnxscript.optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=_FOLD_LIMIT,
            output_size_limit=_FOLD_LIMIT,
            should_fold=lambda node: False if any(is_unbound(v) for v in node.inputs) else None,
        )
    finally:
        logger.setLevel(level)
    common.RemoveUnusedNodesPass()(model)


def elide_no_ops(model: ir.Model) -> bool:
    """Remove nodes whose output is an input: Identity, Cast to the same type, full Slice, idle Reshape, times one.

    A Transpose that undoes the one before it goes too, and so does one that leaves the axes as they are.
    """
    removed = False
    for node in list(model.graph):
        source, target = _unchanged(node), node.outputs[0]
        if source is None:
            continue
        if target.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                continue  # a graph output needs a node of its own
            source.name, target.name = target.name, f"{target.name}_elided"
        ir.convenience.replace_all_uses_with(target, source, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        removed = True
    return removed


def _unchanged(node: ir.Node) -> ir.Value | None:
    """The value that `node` hands on as it is; None when it makes another."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Transpose":
        return undoes_transpose(node)
    if (index := multiplies_by_one(node)) is not None:
        return node.inputs[index]
    return node.inputs[0] if _changes_nothing(node) else None


def _changes_nothing(node: ir.Node) -> bool:
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    match node.op_type:
        case "Identity":
            return True
        case "Cast":
            return source.dtype is not None and node.attributes["to"].as_int() == source.dtype.value
        case "Reshape" | "Expand":
            return _same_shape(source, target)
        case "Slice":
            return _same_shape(source, target) and all(
                step == 1 for step in (integers(node.inputs[4]) or [0] if len(node.inputs) > 4 else [1])
            )
    return False


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None:
        return False
    return dims(a) == dims(b)


def share_constants(model: ir.Model) -> bool:
    """Keep one initializer for each distinct constant. Weights without data are distinct by name."""
    kept: dict[tuple[object, ...], ir.Value] = {}
    removed = False
    for name, value in list(model.graph.initializers.items()):
        data = constant(value)
        if data is None or data.size > _FOLD_LIMIT or value.is_graph_output():
            continue
        key = (value.dtype, data.shape, data.tobytes())
        if key in kept:
            ir.convenience.replace_all_uses_with(value, kept[key])
            model.graph.initializers.pop(name)
            removed = True
        else:
            kept[key] = value
    return removed


def share_shape_sources(model: ir.Model) -> None:
    """Ask the first graph input that has a symbolic dim for its extent, whichever value the tracer happened to ask."""
    source: dict[str, tuple[ir.Value, int]] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(dims(value) if value.shape is not None else ()):
            if isinstance(dim, str):
                source.setdefault(dim, (value, axis))
    for node in model.graph:
        if node.domain != "" or node.op_type != "Shape" or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        shape = dims(node.inputs[0])
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        first = start.as_int() if start is not None else 0
        if end is None or end.as_int() - first != 1 or not 0 <= first < len(shape) or str(shape[first]) not in source:
            continue
        value, axis = source[str(shape[first])]
        node.replace_input_with(0, value)
        node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)


_AXIS_OPS = {
    "Softmax": -1,
    "Concat": None,
    "Split": 0,
    "Gather": 0,
    "TopK": -1,
    "GatherElements": 0,
    "ScatterElements": 0,
}
"""Operators with one `axis` attribute, and its default."""


def normalise_axes(model: ir.Model) -> None:
    """Count axes from the front, so that −1 and 3 are one spelling."""
    for node in model.graph:
        if node.domain != "" or node.op_type not in _AXIS_OPS or not node.inputs or node.inputs[0] is None:
            continue
        default = _AXIS_OPS[node.op_type]
        attribute = node.attributes.get("axis")
        axis = attribute.as_int() if attribute is not None else default
        rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
        if axis is not None and rank:
            node.attributes["axis"] = ir.AttrInt64("axis", axis % rank)
