"""Whose fault is a value that its own nodes get wrong: a weight, a constant, a pass, or a change made afterwards?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.bisect.local import GOT, LocalComparison, Off, called, pairs, path_of
from exporter.bisect.report import Culprit
from exporter.bisect.stages import Rebuilt, Stage
from exporter.bisect.weights import BundleWeights
from exporter.recipes import is_recipe, parameters
from graph_passes.graph import constant

_RULE = "cierzo.rule"


@dataclass(frozen=True, slots=True)
class Case:
    """What one bisection works with: the bundle's graph, what this version makes of the checkpoint, and both compared.

    shared: values of the bundle that golden has too, see `exporter.bisect.local.pairs`.
    """

    model: ir.Model
    rebuilt: Rebuilt
    weights: BundleWeights
    golden: ir.Model
    shared: Mapping[str, str]
    local: LocalComparison


def blame(case: Case, off: Off, piece: ir.Model, others: tuple[str, ...], *, native: bool = False) -> Culprit:
    """The culprit behind the value `off`, which the nodes of `piece` make.

    native: it is off with native kernels only, while function bodies give all values right.
    """
    finished = case.rebuilt.stages[-1].model
    node, changes, fixed = _suspect(piece, finished, off.value, case.model)
    read = map(case.weights.parameter_of, parameters(piece))
    weight = next((name for name in read if name in case.weights.wrong), None)
    rule = node.metadata_props.get(_RULE)
    kind, stage, reproduced = "node", rule, None
    if native:
        kind, stage, weight = "kernel", None, None
        why = (
            f"The native kernel of {node.op_type} computes it: where the function bodies of the bundle run, every "
            "value is right. This is a bug in the kernels of this version, not in the bundle: CIERZO_KERNELS=off runs "
            "without them."
        )
    elif weight is not None:
        kind, stage = "weight", None
        difference = case.weights.wrong[weight]
        why = (
            f"The bundle's {weight} differs from the checkpoint's in {difference.elements:,} of {difference.total:,} "
            f"elements, by up to {difference.largest:.2e}; the first is number {difference.first:,}. "
            "Export the checkpoint again."
        )
    elif fixed is not None:
        kind, stage = "constant", None
        why = (
            f"The constant {fixed} in the bundle's graph is not the one that this version makes of the checkpoint: "
            "the bundle was changed after the export, or was made by another version. Export the checkpoint again."
        )
    else:
        made_by = _first_wrong_stage(case, off.value)
        reproduced = made_by is not None
        if made_by is not None:
            kind, stage = "pass", made_by
            why = (
                f"This version's pass {made_by} makes it: before the pass the value was right, after it the node "
                f"{node.op_type} computes something else. This is a bug in the pass, not in the checkpoint."
            )
        else:
            made = f"The pass {rule} made this node, but this version's" if rule else "This version's graph"
            what = "; ".join(changes) if changes else "it has the same node there"
            why = (
                f"{made} comes out right ({what}): the bundle was changed after the export, or was made by another "
                "version. Export the checkpoint again."
            )
    module = path_of(piece, off.value) or path_of(case.model, off.value)
    return Culprit(
        kind=kind,
        stage=stage,
        reproduced=reproduced,
        layer=layer_of(module, off.value),
        module=module,
        node=str(node.name),
        op=node.op_type,
        value=off.value,
        error=off.error if np.isfinite(off.error) else None,
        step=off.step,
        weight=weight or (None if native else fixed),
        why=why,
        others=others,
    )


def layer_of(module: str, value: str) -> int | None:
    """The layer that a module path, or else the name of a value, belongs to."""
    for text in (module, value):
        if match := re.match(r"(?:layers|past|present)\.(\d+)\.?", text):
            return int(match.group(1))
    return None


def _suspect(piece: ir.Model, finished: ir.Model, value: str, model: ir.Model) -> tuple[ir.Node, list[str], str | None]:
    """The first node of the piece that this version would not make, what is different, and the constant if it is one.

    Several nodes are in a piece only where the bundle's graph has values that golden does not know. A node that this
    version makes otherwise comes before one that it does not make at all; when none differs, it is the last one.
    """
    made = {str(v.name): node for node in finished.graph for v in node.outputs}
    named = {str(node.name): node for node in finished.graph}
    own = {str(v.name): node for node in model.graph for v in node.outputs}
    last = next(node for node in piece.graph for v in node.outputs if v.name == value)
    unknown: tuple[ir.Node, list[str], str | None] | None = None
    for node in piece.graph:
        if is_recipe(node):  # what a parameter is made of is compared as a weight
            continue
        ours = own[str(node.outputs[0].name).removesuffix(GOT)]
        due = made.get(str(ours.outputs[0].name)) or named.get(str(node.name))
        changes = _changes(ours, due, known={*made, *(str(v.name) for v in finished.graph.inputs)})
        changes += _body_changes(node, model, finished)
        fixed = None if due is None else _wrong_constant(ours, due)
        if fixed or (changes and due is not None):
            return node, changes, fixed
        if changes and unknown is None:
            unknown = node, changes, None
    return unknown or (last, [], None)


def _changes(node: ir.Node, due: ir.Node | None, known: set[str]) -> list[str]:
    """How a node differs from the one that this version makes. known: values that this version has."""
    if due is None:
        return [f"it has no node {node.op_type} {node.name}"]
    if node.op_identifier() != due.op_identifier():
        return [f"it has {due.op_type} there where the bundle has {node.op_type}"]
    changes = []
    ours, theirs = ([None if v is None else str(v.name) for v in side.inputs] for side in (node, due))
    if any(a != b and a in known for a, b in itertools.zip_longest(ours, theirs)):
        changes.append(
            f"its inputs there are {', '.join(map(str, theirs))} where the bundle has {', '.join(map(str, ours))}"
        )
    return changes + _other_attributes(node, due)


def _other_attributes(node: ir.Node, due: ir.Node) -> list[str]:
    """The attributes in which a node differs from the one that this version makes, in words."""
    changes = []
    for name in sorted({*node.attributes, *due.attributes}):
        a, b = (_shown(side.attributes.get(name)) for side in (node, due))
        if a != b:
            changes.append(f"its {name} is {b} where the bundle has {a}")
    return changes


def changed_values(model: ir.Model, finished: ir.Model) -> list[str]:
    """What is made by nodes that this version makes too, but with other attributes, constants or function bodies."""
    named = {str(node.name): node for node in finished.graph}
    return [
        str(value.name)
        for node in model.graph
        if (due := named.get(str(node.name))) is not None and node.op_identifier() == due.op_identifier()
        if _wrong_constant(node, due) or _other_attributes(node, due) or _body_changes(node, model, finished)
        for value in node.outputs
    ]


def _wrong_constant(node: ir.Node, due: ir.Node) -> str | None:
    """A constant input that holds other numbers than the one in its place in this version's node."""
    for ours, theirs in zip(node.inputs, due.inputs, strict=False):
        a, b = constant(ours), constant(theirs)
        if a is not None and b is not None and (a.dtype != b.dtype or not np.array_equal(a, b)):
            assert ours is not None
            return str(ours.name)
    return None


def _shown(attribute: ir.Attr | None) -> str:
    if attribute is None:
        return "absent"
    return f"{attribute.value:.9g}" if attribute.type == ir.AttributeType.FLOAT else str(attribute.value)


def _body_changes(node: ir.Node, model: ir.Model, finished: ir.Model) -> list[str]:
    """Which function bodies, that of a plugin node and those that it calls, are others than this version's."""
    changes = []
    for op in called(model, [node.op_identifier()]):
        due = finished.functions.get(op)
        if due is not None and _body(model.functions[op]) != _body(due):
            changes.append(f"its function body of {op[1]} is another")
    return changes


def _body(function: ir.Function) -> str:
    """Operators, wires and attributes; names of nodes do not count, as a file need not keep them."""
    return "\n".join(
        f"{[v.name for v in node.outputs]} = {node.op_type} {[None if v is None else v.name for v in node.inputs]} "
        f"{sorted((name, _shown_tensor(attribute)) for name, attribute in node.attributes.items())}"
        for node in function
    )


def _shown_tensor(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    return (
        str(attribute.as_tensor().numpy().tolist()) if attribute.type == ir.AttributeType.TENSOR else _shown(attribute)
    )


def _first_wrong_stage(case: Case, value: str) -> str | None:
    """The first pass of this version after which `value` is wrong, None when it is right in the finished graph.

    Stages are cut where the bundle is, and nowhere in between: a later pass may take in the node that is wrong.
    """
    borders = set(case.shared.values())

    def wrong_after(stage: Stage) -> bool:
        whole = case.weights.bind(stage.model)
        shared = {name: other for name, other in pairs(whole, case.golden).items() if other in borders}
        return value in shared and bool(case.local.off(whole, shared, only=[value]))

    passes = case.rebuilt.stages[1:]
    if not passes or not wrong_after(passes[-1]):
        return None
    return next((stage.name for stage in passes[:-1] if wrong_after(stage)), passes[-1].name)
