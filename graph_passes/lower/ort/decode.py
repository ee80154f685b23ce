"""The graph for steps of one token, out of the one for any number: T = 1 and R = 1.

A captured step replays what was launched, so its shapes depend on nothing. The token's position is where its row
starts, and its row is the one that logits are asked for.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.lower.ort.rewriting import fresh, input_of, insert, integers, shape_of
from graph_passes.lower.ort.steps import IDS, ROWS, START
from graph_passes.lower.ort.unused import remove_unused
from runtime.errors import FusionError


def specialize_decode(model: ir.Model) -> None:
    """Rewrite `model`, which `unflatten_steps` has rewritten, in place, before or after attention is.

    Inputs are then input_ids [B, 1], start_positions [B] and whatever else was there but logit_positions; logits are
    [B, 1, V]. token_counts stays as long as something reads it (`remove_unused`). Raises FusionError for a graph that
    `unflatten_steps` has not been through.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    if {IDS, START, ROWS} - inputs.keys():
        raise FusionError(f"The graph has other inputs than {IDS}, {START} and {ROWS}. Export the checkpoint again.")
    _, tokens = shape_of(inputs[IDS])
    _, asked = shape_of(inputs[ROWS])
    _place_tokens(model, inputs[START])
    _read_the_only_row(model, inputs[ROWS])
    _fix_extents(model, {str(tokens), str(asked)})
    _reshape_by_constants(model)
    model.graph.inputs.remove(inputs[ROWS])
    remove_unused(model, [str(value.name) for value in model.graph.inputs])


def _place_tokens(model: ir.Model, start: ir.Value) -> None:
    """Positions are start_positions + 0."""
    sums = [node for node in model.graph if node.domain == "" and node.op_type == "CumSum"]
    uses = [use.node for node in sums for use in node.outputs[0].uses()]
    if len(sums) != 1 or len(uses) != 1 or uses[0].op_type != "Add":
        raise FusionError(
            "The positions of a step are computed in another way than expected. Export the checkpoint again."
        )
    positions = uses[0]
    column = fresh(f"{positions.outputs[0].name}.column", ir.DataType.INT64, [*shape_of(start), 1])
    insert(model, positions, "Unsqueeze", [start, integers(model, [1])], column)
    ir.convenience.replace_all_uses_with(positions.outputs[0], column)


def _read_the_only_row(model: ir.Model, asked: ir.Value) -> None:
    """Nothing is left to choose among one row."""
    for node in [node for node in model.graph if node.domain == "" and node.op_type == "GatherND"]:
        picked = input_of(node, 1).producer()
        if picked is not None and picked.op_type == "Unsqueeze" and picked.inputs[0] is asked:
            ir.convenience.replace_all_uses_with(node.outputs[0], input_of(node, 0))
            model.graph.remove(node, safe=True)
            model.graph.remove(picked, safe=True)
    if asked.uses():
        raise FusionError(f"{ROWS} is read in another way than expected. Export the checkpoint again.")


def _fix_extents(model: ir.Model, ones: set[str]) -> None:
    """Shapes say 1 wherever they said T or R, alone or in a product."""
    values = {*model.graph.inputs, *(value for node in model.graph for value in node.outputs)}
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_fixed(extent, ones) for extent in value.shape])


def _fixed(extent: int | ir.SymbolicDim, ones: set[str]) -> int | ir.SymbolicDim:
    if isinstance(extent, int) or extent.value is None:
        return extent
    factors = [factor for factor in extent.value.split("*") if factor not in ones]
    return ir.SymbolicDim("*".join(factors)) if factors else 1


def _reshape_by_constants(model: ir.Model) -> None:
    """A Reshape to the shape of other rows says [-1, 1, C]."""
    for node in model.graph:
        if node.domain != "" or node.op_type != "Reshape":
            continue
        shape = input_of(node, 1).producer()
        if shape is not None and shape.op_type == "Shape":
            rest = [extent for extent in shape_of(input_of(shape, 0))[1:] if isinstance(extent, int)]
            node.replace_input_with(1, integers(model, [-1, *rest]))
