"""Gives the rows of a step their two axes back: [B, T, C] all the way, and [B, R, C] where logits are asked for.

A bundle's graph lays rows one behind the other, [B·T, C], and computes shapes to take them apart again for attention.
ONNX Runtime computes with shapes on the CPU, which a captured graph cannot and a session for the GPU alone may not.
With both axes kept, every Reshape says what it does by constants, 0 for an extent that stays. Positions and the choice
of rows for logits, which took shapes as well, are computed on the device:

    positions[b, t] = start_positions[b] + t,  t by a running sum of ones made of input_ids
    rows[b, r]      = hidden[b, logit_positions[b, r]]

Only mixtures of experts want rows without a second axis; they are reshaped just around those.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.lower.ort.index_values import computed
from graph_passes.lower.ort.rewriting import (
    constant,
    dtype_of,
    fresh,
    input_of,
    insert,
    integers,
    is_op,
    like,
    shape_of,
    substitute,
)
from graph_passes.lower.ort.unused import remove_unused
from graph_passes.ops.base import DOMAIN
from graph_passes.ops.gated_activation import GATED_ACTIVATION
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.moe_gate import MOE_GATE
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.quantized_moe import QUANTIZED_MIXTURE_OF_EXPERTS
from graph_passes.ops.rms_norm import RMS_NORM
from graph_passes.ops.stored_matmul import STORED_MATMUL
from runtime.errors import FusionError

IDS, START, ROWS = "input_ids", "start_positions", "logit_positions"
"""Inputs of a bundle's graph: [B, T], [B] and [B, R], all int64."""

_ON_LAST_AXIS = frozenset({STORED_MATMUL.name, QUANTIZED_MATMUL.name, RMS_NORM.name, GATED_ACTIVATION.name})
_MIXTURES = (MIXTURE_OF_EXPERTS.name, QUANTIZED_MIXTURE_OF_EXPERTS.name)
_POINTWISE = frozenset({"Cast", "Identity", "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Neg", "Exp", "Tanh", "Sigmoid"})
_SHAPES = frozenset({"Shape", "Size", "Range"})

Extents = list[int | ir.SymbolicDim]


def unflatten_steps(model: ir.Model) -> None:
    """Rewrite `model`, a bundle's graph after `pack_attention`, in place; its inputs and outputs stay.

    Raises FusionError where rows are moved in a way that this does not follow, and if shapes are still computed with
    afterwards.
    """
    remove_unused(model, [str(value.name) for value in model.graph.inputs])
    steps = _Steps(model)
    steps.compute_positions()
    for node in list(model.graph):
        steps.visit(node)
    remove_unused(model, [str(value.name) for value in model.graph.inputs])
    for node in model.graph:
        if node.domain == "" and node.op_type in _SHAPES and not _is_read_as_shape(node):
            raise FusionError(f"{_place(node)} computes with shapes, which this backend cannot. {_EXPORT_AGAIN}")


_EXPORT_AGAIN = "Export the checkpoint again with this version, with the reference front end."


class _Steps:
    def __init__(self, model: ir.Model) -> None:
        self._model = model
        inputs = {str(value.name): value for value in model.graph.inputs}
        missing = {IDS, START, ROWS} - inputs.keys()
        if missing:
            raise FusionError(f"The graph has no input {missing.pop()}. {_EXPORT_AGAIN}")
        self._ids, self._start, self._rows = inputs[IDS], inputs[START], inputs[ROWS]
        batch, tokens = shape_of(self._ids)
        _, asked = shape_of(self._rows)
        self._flat = {f"{batch}*{tokens}": [batch, tokens], f"{batch}*{asked}": [batch, asked]}
        self._positions_shape = [str(batch), str(tokens)]
        self._flattenings: dict[ir.Value, ir.Value] = {}

    def _with_both_axes(self, value: ir.Value) -> Extents | None:
        """The shape [B, T, ...] of a value that has [B·T, ...] or has it already; None for any other."""
        if value.shape is None or not value.shape:
            return None
        first, *rest = shape_of(value)
        if str(first) in self._flat:
            return [*self._flat[str(first)], *rest]
        both = [str(extent) for extent in shape_of(value)[:2]]
        return shape_of(value) if len(both) == 2 and any(both == [*map(str, a)] for a in self._flat.values()) else None

    def compute_positions(self) -> None:
        """Let the positions be computed on the device: the values [B, T] that are start + t."""
        made = [node.outputs[0] for node in self._model.graph if node.outputs[0].dtype == ir.DataType.INT64]
        shaped = [value for value in made if [str(extent) for extent in value.shape or ()] == self._positions_shape]
        found = [value for value in shaped if self._are_positions(value)]
        if not found:
            return
        model, before = self._model, found[0].producer()
        assert before is not None
        shape = shape_of(self._ids)
        nothing = insert(model, before, "Sub", [self._ids, self._ids], fresh("steps.nothing", ir.DataType.INT64, shape))
        one = constant(model, np.array(1, np.int64))
        ones = insert(model, before, "Add", [nothing, one], like(nothing, "steps.ones"))
        steps = like(nothing, "steps")
        insert(model, before, "CumSum", [ones, one], steps, {"exclusive": 1})
        column = fresh("steps.start", ir.DataType.INT64, [shape[0], 1])
        insert(model, before, "Unsqueeze", [self._start, integers(model, [1])], column)
        positions = insert(model, before, "Add", [column, steps], like(nothing, "steps.positions"))
        for value in found:
            ir.convenience.replace_all_uses_with(value, positions)

    def _are_positions(self, value: ir.Value) -> bool:
        for start in ([5, 11], [0, 3, 2]):
            for tokens in (1, 4):
                feeds = {IDS: np.ones((len(start), tokens), np.int64), START: np.array(start, np.int64)}
                made = computed(value, feeds)
                if made is None or not np.array_equal(made, feeds[START][:, None] + np.arange(tokens)):
                    return False
        return True

    def _are_asked_rows(self, indices: ir.Value) -> bool:
        """Whether they are the numbers b · T + logit_positions[b, r] of rows [B·T], one after the other."""
        for asked in ([[3, 0], [1, 1], [0, 2]], [[2]], [[0], [3]]):
            feeds = {IDS: np.ones((len(asked), 4), np.int64), ROWS: np.array(asked, np.int64)}
            made = computed(indices, feeds)
            if made is None or not np.array_equal(made, (feeds[ROWS] + 4 * np.arange(len(asked))[:, None]).reshape(-1)):
                return False
        return True

    def visit(self, node: ir.Node) -> None:
        """Give what the node makes its two axes, if it makes rows; what it reads has them by now."""
        if all(value.dtype == ir.DataType.INT64 for value in node.outputs):
            return  # indices, which nobody reads any more
        if node.op_type == "Reshape" and node.domain == "":
            self._reshape(node)
            return
        flat = [value for value in node.outputs if value.shape and str(value.shape[0]) in self._flat]
        if is_op(node, *_MIXTURES):
            self._mixture(node)
        elif is_op(node, MOE_GATE.name):
            node.replace_input_with(0, self._flattened(node, input_of(node, 0)))
        elif flat and node.op_type == "Gather" and node.domain == "":
            self._asked_rows(node)
        elif flat:
            self._keep_axes(node)

    def _reshape(self, node: ir.Node) -> None:
        source, old = input_of(node, 0), node.outputs[0]
        wanted, has = self._with_both_axes(old), self._with_both_axes(source)
        if wanted is None and has is None:
            return
        if wanted is None or has is None or [*map(str, wanted[:2])] != [*map(str, has[:2])]:
            raise FusionError(
                f"{_place(node)} takes rows apart in a way that this backend does not know. {_EXPORT_AGAIN}"
            )
        if [*map(str, wanted)] == [*map(str, shape_of(source))]:
            if old.is_graph_output():
                substitute(self._model, node, old, source)
            else:
                ir.convenience.replace_all_uses_with(old, source)
            return
        widths = [extent for extent in wanted[2:] if isinstance(extent, int)]
        if len(widths) < len(wanted) - 2:
            raise FusionError(f"{_place(node)} makes rows whose width is not known. {_EXPORT_AGAIN}")
        node.replace_input_with(1, integers(self._model, [0, 0, *widths]))
        node.attributes.pop("allowzero", None)
        old.shape = ir.Shape(wanted)

    def _flattened(self, node: ir.Node, rows: ir.Value) -> ir.Value:
        """The rows without their second axis, for `node` and whoever else wants them so."""
        if rows not in self._flattenings:
            first, second, width = shape_of(rows)
            assert isinstance(width, int)
            flat = fresh(f"{rows.name}.flat", dtype_of(rows), [ir.SymbolicDim(f"{first}*{second}"), width])
            insert(self._model, node, "Reshape", [rows, integers(self._model, [-1, width])], flat)
            self._flattenings[rows] = flat
        return self._flattenings[rows]

    def _mixture(self, node: ir.Node) -> None:
        rows, old = input_of(node, 0), node.outputs[0]
        node.replace_input_with(0, self._flattened(node, rows))
        extents = fresh(f"{old.name}.extents", ir.DataType.INT64, [3])
        made = fresh(f"{old.name}.steps", dtype_of(old), shape_of(rows))
        shape = ir.Node("", "Shape", [rows], outputs=[extents], name=f"{extents.name}.shape")
        reshape = ir.Node("", "Reshape", [old, extents], outputs=[made], name=f"{made.name}.reshape")
        self._model.graph.insert_after(node, [shape, reshape])
        for use in list(old.uses()):
            if use.node is not reshape:
                use.node.replace_input_with(use.idx, made)

    def _asked_rows(self, node: ir.Node) -> None:
        rows, indices, old = input_of(node, 0), input_of(node, 1), node.outputs[0]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if axis != 0 or self._with_both_axes(rows) is None or not self._are_asked_rows(indices):
            raise FusionError(f"{_place(node)} picks rows in a way that this backend does not know. {_EXPORT_AGAIN}")
        picked = fresh(f"{old.name}.places", ir.DataType.INT64, [*shape_of(self._rows), 1])
        insert(self._model, node, "Unsqueeze", [self._rows, integers(self._model, [-1])], picked)
        made = fresh(f"{old.name}.asked", dtype_of(old), [*shape_of(self._rows), *shape_of(rows)[2:]])
        insert(self._model, node, "GatherND", [rows, picked], made, {"batch_dims": 1})
        substitute(self._model, node, old, made)

    def _keep_axes(self, node: ir.Node) -> None:
        if node.domain == DOMAIN:
            known = node.op_type in _ON_LAST_AXIS
        else:
            others = [value for value in node.inputs if value is not None and self._with_both_axes(value) is None]
            spread = all(value.shape is not None and len(value.shape) <= 1 for value in others)
            known = node.domain == "" and node.op_type in {*_POINTWISE, "Split"} and spread
        if not known:
            raise FusionError(f"{_place(node)} treats rows in a way that this backend does not know. {_EXPORT_AGAIN}")
        if node.op_type == "Split":
            if node.attributes["axis"].as_int() not in (-1, 1):
                raise FusionError(f"{_place(node)} splits rows across. {_EXPORT_AGAIN}")
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        for value in node.outputs:
            value.shape = ir.Shape(self._with_both_axes(value) or [])


def _is_read_as_shape(node: ir.Node) -> bool:
    """Whether it is a Shape that Reshapes read as it is: that is done where the numbers lie, without a node."""
    uses = list(node.outputs[0].uses())
    return node.op_type == "Shape" and all(use.node.op_type == "Reshape" and use.idx == 1 for use in uses)


def _place(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"
