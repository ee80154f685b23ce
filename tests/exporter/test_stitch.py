"""The template copied to L layers: the same function as the reference, for any number and order of layers."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from exporter.compile import build_graph, expected_fusions
from exporter.plan import ExportPlan, make_plan
from exporter.stitch import stitch
from graph_passes import pipeline
from graph_passes.unbound import UnboundWeight
from reference.checkpoint import open_checkpoint
from reference.weights import parameter_shapes
from runtime.errors import TraceError
from tests.support.bundles import checkpoint, exported, shared_traces, trace_once
from tests.support.parity import Judge, random_rows

SAME: dict[str, Any] = {}
MIXED: dict[str, Any] = {"architecture": "ministral"}

STACKS: dict[str, tuple[dict[str, Any], list[int | None]]] = {
    "one": (SAME, [5]),
    "two": (SAME, [5, 5]),
    "five": (SAME, [5, 5, 5, 5, 5]),
    "both kinds": (MIXED, [4, None]),
    "sliding ones between": (MIXED, [4, None, 4, 4, None, 4]),
    "full ones first": (MIXED, [None, None, 4]),
}


def settings_of(name: str) -> dict[str, Any]:
    settings, windows = STACKS[name]
    kinds = {"layer_windows": windows} if settings is MIXED else {"window": windows[0]}
    return {**settings, **kinds, "num_layers": len(windows)}


def plan_of(name: str) -> ExportPlan:
    config = open_checkpoint(checkpoint(**settings_of(name))).config
    return make_plan(config, chunk=3, context=30 if None in STACKS[name][1] else None)


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_of_layers_is_the_reference(name: str) -> None:
    context = 30 if None in STACKS[name][1] else None
    case = exported(chunk=3, context=context, **settings_of(name))
    judge = Judge(case)
    judge.hold(case.session(), random_rows([30, 4, 17], judge.vocab_size, seed=1), seed=2)


@pytest.mark.parametrize("name", STACKS)
def test_inputs_outputs_and_weights_are_those_of_all_layers(name: str) -> None:
    plan = plan_of(name)
    with shared_traces():
        model, report = build_graph(plan, prove=False)
    layers = range(plan.config.num_layers)
    rings = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    steps = ["input_ids", "start_positions", "token_counts", "logit_positions"]
    inputs = [*steps, *(f"past.{ring}" for ring in rings)]
    assert [value.name for value in model.graph.inputs] == inputs
    assert [value.name for value in model.graph.outputs] == ["logits", *(f"present.{ring}" for ring in rings)]
    weights = {
        name: tuple(value.const_value.shape)
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, UnboundWeight)
    }
    assert weights == parameter_shapes(plan.config)
    sizes = [plan.capacity(kind) for kind in plan.kind_of_layer for _ in ("key", "value")]
    for values in (model.graph.inputs[len(steps) :], model.graph.outputs[1:]):
        shapes = [value.shape for value in values]
        assert [None if shape is None else shape[2] for shape in shapes] == sizes
    assert report.counts["sliding_window"] == len(plan.kinds), "the passes run on the template, whatever L is"


def test_every_value_and_node_has_a_name_of_its_own() -> None:
    with shared_traces():
        model, _ = build_graph(plan_of("sliding ones between"), prove=False)
    values = [output.name for node in model.graph for output in node.outputs]
    values += [value.name for value in model.graph.inputs] + list(model.graph.initializers)
    assert len(values) == len(set(values))
    nodes = [node.name for node in model.graph]
    assert len(nodes) == len(set(nodes))


def test_angles_and_shapes_are_computed_once_for_all_layers() -> None:
    with shared_traces():
        counts = {}
        for name in ("one", "two", "five"):
            model, _ = build_graph(plan_of(name), prove=False)
            counts[name] = (len(model.graph), sum(node.op_type in ("Cos", "Sin", "Range") for node in model.graph))
    per_layer = counts["two"][0] - counts["one"][0]
    assert counts["five"][0] - counts["two"][0] == 3 * per_layer
    once = 1 + 1 + 2  # Cos, Sin, and a Range each for the tokens and for the rows whose logits are asked for
    assert {cos_sin_range for _, cos_sin_range in counts.values()} == {once}


def fused_template(plan: ExportPlan) -> ir.Model:
    template = trace_once(plan)
    pipeline.run(template, expected_fusions(plan, len(plan.kinds)), proving=False)
    return template


def test_layers_joined_by_more_than_one_hidden_state_are_refused() -> None:
    plan = plan_of("both kinds")
    template = fused_template(plan)
    of_second = [
        node
        for node in template.graph
        if node.op_type == "Add" and "layers.1" in node.metadata_props["pkg.torch.onnx.name_scopes"]
    ]
    embedded = next(node for node in template.graph if node.op_type == "Gather").outputs[0]
    hidden = next(use.node for use in embedded.uses()).outputs[0]  # [N, C], before the first layer
    residual = of_second[-1]
    residual.replace_input_with(0, hidden)
    with pytest.raises(TraceError, match=r"Layer 1 of the traced template takes .* where one hidden state each"):
        stitch(template, plan)
