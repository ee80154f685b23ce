"""Applies one rule over a graph: match and check completely, prove, then rewrite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir
import onnx_ir.passes.common as common

from graph_passes.driver_types import Adapted, FusionRecord, Match, RefusalRecord, Rule
from graph_passes.graph import Refusal, scope, source_line
from graph_passes.ops.base import declare_op
from graph_passes.prove import Proof, prove
from graph_passes.twin import Twin
from runtime.errors import ProofError

_FARTHEST = 60
"""Nodes from the anchor within which the place of a refusal is looked for."""


def apply(model: ir.Model, rule: Rule, *, proving: bool = True) -> tuple[list[FusionRecord], list[RefusalRecord]]:
    """Rewrite every place where `rule` applies, in place; returns what was done and what was refused and why.

    Raises ProofError before anything is changed at the place where the proof failed, and FusionError when two nodes of
    one op would need different function bodies.
    """
    fused: list[FusionRecord] = []
    refused: list[RefusalRecord] = []
    if rule.prepare is not None:
        rule.prepare(model)
    for anchor in list(model.graph):
        if anchor.graph is None or (anchor.domain, anchor.op_type) not in rule.anchors:
            continue
        match = _found(rule, model, anchor)
        if isinstance(match, RefusalRecord):
            refused.append(match)
            continue
        fused.append(rewrite(model, match, prove(model, match) if proving else None))
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return fused, refused


def apply_in_step(
    twin: Twin, model: ir.Model, rule: Rule, *, proving: bool = True
) -> tuple[list[FusionRecord], list[RefusalRecord]]:
    """`apply` on a model that is too large to be run: matched and proved on the twin, carried over, both rewritten."""
    fused: list[FusionRecord] = []
    refused: list[RefusalRecord] = []
    if rule.prepare is not None:
        for each in (twin.small, model):
            rule.prepare(each)
    for anchor in list(twin.small.graph):
        if anchor.graph is None or (anchor.domain, anchor.op_type) not in rule.anchors:
            continue
        match = _found(rule, twin.small, anchor)
        if isinstance(match, RefusalRecord):
            refused.append(match)
            continue
        proof = prove(twin.small, match) if proving else None
        large = twin.transplant(match)
        small_record, record = rewrite(twin.small, match, proof), rewrite(model, large, proof)
        if small_record != record:
            raise ProofError(
                f"{match.place}: the small twin that proved this rewrite replaced {small_record.replaced} and the "
                f"model {record.replaced}. Nothing was written."
            )
        fused.append(record)
    for each in (twin.small, model):
        common.RemoveUnusedFunctionsPass()(each)  # type: ignore[no-untyped-call]
    return fused, refused


def rewrite(model: ir.Model, match: Match, proof: Proof | None) -> FusionRecord:
    """Put the plugin node in the place of the region. Output names and the tracer's metadata stay."""
    declare_op(model, match.op, match.attributes, match.place)
    outputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in match.outputs]
    name = f"{match.anchor.name}__{match.op.name}"
    made: list[ir.Node] = []
    inputs: list[ir.Value] = []
    for number, operand in enumerate(match.inputs):
        if isinstance(operand, Adapted):
            nodes = list(operand.build(operand.source))
            _name(nodes, f"{name}__input_{number}")
            nodes[-1].outputs[0].shape = ir.Shape(operand.shape)
            nodes[-1].outputs[0].dtype = operand.dtype
            made += nodes
            inputs.append(nodes[-1].outputs[0])
        else:
            inputs.append(operand)
    node = match.op.node(inputs, match.attributes, outputs)
    node.name = name
    for new in (*made, node):
        new.metadata_props.update(match.anchor.metadata_props)
        new.metadata_props["cierzo.rule"] = match.rule
    if proof is not None:
        node.metadata_props["cierzo.proof_error"] = f"{proof.error:.3g}"
        node.metadata_props["cierzo.proof_precision"] = proof.precision
    names = [v.name for v in match.outputs]
    place = _place(model, match)
    producers = [v.producer() for v in match.outputs]
    ir.convenience.replace_nodes_and_values(model.graph, place, [], [*made, node], list(match.outputs), outputs)
    if len(outputs) > 1:
        model.graph.sort()
    for old, new_value, value_name in zip(match.outputs, outputs, names, strict=True):
        old.name, new_value.name = f"{value_name}__before", value_name
    gone = _remove_unread(model, [p for p in (*producers, match.anchor) if p is not None])
    replaced = tuple(sorted(str(dead.name) for dead in gone))
    replaced_ops = dict(sorted(Counter(dead.op_type for dead in gone).items()))
    node.metadata_props["cierzo.replaced"] = ",".join(replaced)
    node.metadata_props["cierzo.from"] = " ".join(f"{op}×{count}" for op, count in replaced_ops.items())
    return FusionRecord(
        rule=match.rule,
        op=match.op.name,
        scope=scope(node),
        node=str(node.name),
        replaced=replaced,
        replaced_ops=replaced_ops,
        attributes=dict(match.attributes),
        error=None if proof is None else proof.error,
        precision=None if proof is None else proof.precision,
    )


def _name(nodes: Iterable[ir.Node], prefix: str) -> None:
    for index, node in enumerate(nodes):
        node.name = f"{prefix}_{index}"
        for value in node.outputs:
            value.name = f"{prefix}_{index}_out"


def _place(model: ir.Model, match: Match) -> ir.Node:
    """After the last producer of the region's outputs, where every input of the new node is defined.

    A reader of an earlier output may stand before it, so that several outputs need the nodes sorted afterwards.
    """
    producers = [v.producer() or match.anchor for v in match.outputs]
    if len(producers) == 1:
        return producers[0]
    order = {node: index for index, node in enumerate(model.graph)}
    return max(producers, key=lambda producer: order[producer])


def _remove_unread(model: ir.Model, seeds: Iterable[ir.Node]) -> list[ir.Node]:
    """Remove `seeds` and what is behind them as far as nobody reads it; the work is the region's, not the graph's."""
    gone: list[ir.Node] = []
    stack = list(seeds)
    while stack:
        node = stack.pop()
        if node.graph is None or any(v.is_graph_output() or v.uses() for v in node.outputs):
            continue
        behind = [v.producer() for v in node.inputs if v is not None]
        constants = [v for v in node.inputs if v is not None and v.is_initializer()]
        model.graph.remove(node, safe=True)
        gone.append(node)
        stack.extend(producer for producer in behind if producer is not None)
        for value in constants:
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                model.graph.initializers.pop(str(value.name), None)
    return gone


def _found(rule: Rule, model: ir.Model, anchor: ir.Node) -> Match | RefusalRecord:
    """The match at `anchor`, or why there is none.

    A matcher changes nothing, so that one which stumbles over a graph that nobody thought of has refused it: the export
    goes on, and the count decides whether the place mattered. The report names the exception.
    """
    try:
        return rule.match(model, anchor)
    except Refusal as refusal:
        return _refused(rule, anchor, refusal)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        stumbled = f"the matcher itself failed with {type(error).__name__} ({error}), which is a bug in the rule"
        return _refused(rule, anchor, Refusal(stumbled, anchor))


def _refused(rule: Rule, anchor: ir.Node, refusal: Refusal) -> RefusalRecord:
    broke = refusal.node if refusal.node is not None else anchor
    return RefusalRecord(
        rule=rule.name,
        scope=scope(anchor),
        anchor=f"{anchor.op_type} {anchor.name!r}",
        reason=str(refusal),
        distance=_distance(anchor, broke),
        source=source_line(broke),
    )


def _distance(start: ir.Node, end: ir.Node) -> int:
    """Edges between two nodes, whichever way they point; 0 when they are too far apart to be one pattern."""
    seen, front, steps = {start}, [start], 0
    while front and len(seen) < _FARTHEST:
        if end in front:
            return steps
        steps += 1
        near: list[ir.Node | None] = []
        for node in front:
            near += [v.producer() for v in node.inputs if v is not None]
            near += [use.node for v in node.outputs for use in v.uses()]
        front = [node for node in dict.fromkeys(near) if node is not None and node not in seen]
        seen.update(front)
    return 0
