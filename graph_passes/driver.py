"""Applies one rule over a graph: match and check completely, prove, then rewrite."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from graph_passes.driver_types import FusionRecord, Match, RefusalRecord, Rule
from graph_passes.graph import Refusal, scope
from graph_passes.ops.base import declare
from graph_passes.prove import prove
from runtime.errors import FusionError


def apply(model: ir.Model, rule: Rule, *, proving: bool = True) -> tuple[list[FusionRecord], list[RefusalRecord]]:
    """Rewrite every place where `rule` applies, in place; returns what was done and what was refused and why.

    Raises ProofError before anything is changed at the place where the proof failed, and FusionError when two nodes of
    one op would need different function bodies.
    """
    fused: list[FusionRecord] = []
    refused: list[RefusalRecord] = []
    for anchor in list(model.graph):
        if anchor.graph is None or (anchor.domain, anchor.op_type) not in rule.anchors:
            continue
        try:
            match = rule.match(model, anchor)
        except Refusal as refusal:
            refused.append(RefusalRecord(rule.name, scope(anchor), str(refusal)))
            continue
        error = prove(model, match) if proving else None
        fused.append(rewrite(model, match, error))
    return fused, refused


def rewrite(model: ir.Model, match: Match, error: float | None) -> FusionRecord:
    """Put the plugin node in the place of the region. Output names and the tracer's metadata stay."""
    _declare_body(model, match)
    before = {node.name for node in model.graph}
    outputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in match.outputs]
    node = match.op.node(match.inputs, match.attributes, outputs)
    node.name = f"{match.anchor.name}__{match.op.name}"
    node.metadata_props.update(match.anchor.metadata_props)
    node.metadata_props["cierzo.rule"] = match.rule
    if error is not None:
        node.metadata_props["cierzo.proof_error"] = f"{error:.3g}"
    names = [v.name for v in match.outputs]
    # After the last producer of the region's outputs, where every input of the new node is defined. A reader of an
    # earlier output may stand before it, so that several outputs need the nodes sorted.
    order = {before: index for index, before in enumerate(model.graph)}
    place = max((v.producer() or match.anchor for v in match.outputs), key=lambda producer: order[producer])
    ir.convenience.replace_nodes_and_values(model.graph, place, [], [node], list(match.outputs), outputs)
    if len(outputs) > 1:
        model.graph.sort()
    for old, new, name in zip(match.outputs, outputs, names, strict=True):
        old.name, new.name = f"{name}__before", name
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    gone = tuple(sorted(str(name) for name in before - {n.name for n in model.graph} if name))
    node.metadata_props["cierzo.replaced"] = ",".join(gone)
    return FusionRecord(match.rule, match.op.name, scope(node), str(node.name), gone, dict(match.attributes), error)


def _declare_body(model: ir.Model, match: Match) -> None:
    """A bundle holds one body for each op; attributes that the body refers to may differ, the body itself may not."""
    function = match.op.function(match.attributes)
    present = model.functions.get(function.identifier())
    if present is not None and _text(present) != _text(function):
        raise FusionError(
            f"{match.place}: this node needs another function body of {match.op.name} than an earlier one, and an ONNX "
            "file holds one. Layers that differ in this way cannot share a file yet."
        )
    declare(model, function)


def _text(function: ir.Function) -> str:
    return str(ir.to_proto(function))
