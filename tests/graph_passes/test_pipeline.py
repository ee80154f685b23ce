"""The whole pipeline on traced templates: one with two kinds of windows, one with experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graph_passes import pipeline
from graph_passes.canonical import canonicalise
from graph_passes.driver import apply
from graph_passes.graph import dims, scope
from graph_passes.ops import DOMAIN
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION
from graph_passes.prove import TOLERANCES
from graph_passes.unbound import is_unbound
from runtime.errors import FusionError
from tests.graph_passes.conftest import Template
from tests.support.graphs import Arrays, bind, check, op_types, run, serialised

RULES = [rule.name for rule, _ in pipeline.PIPELINE]


def assert_same_step(before: Arrays, after: Arrays, counts: np.ndarray) -> None:
    """Rings equal everywhere, logits at every token that is no padding."""
    assert list(before) == list(after)
    for name, old in before.items():
        rows = [slice(0, n) for n in counts] if name == "logits" else [slice(None)] * len(counts)
        assert np.abs(old).max() > 0.5
        for row, taken in enumerate(rows):
            np.testing.assert_allclose(after[name][row, taken], old[row, taken], rtol=1e-4, atol=2e-5, err_msg=name)


def test_every_step_keeps_numbers_names_and_weights(template: Template) -> None:
    model, feeds = template.model(), template.feeds()
    want = run(bind(model), feeds)
    weights = {name for name, value in model.graph.initializers.items() if is_unbound(value)}
    interface = [[str(v.name) for v in side] for side in (model.graph.inputs, model.graph.outputs)]
    assert len(weights) > 10
    canonicalise(model)
    assert_same_step(want, run(bind(model), feeds), feeds["token_counts"])
    for rule, _ in pipeline.PIPELINE:
        scopes = {str(v.name): scope(node) for node in model.graph for v in node.outputs}
        fused, _ = apply(model, rule)
        assert len(fused) == template.expected.get(rule.name, 0)
        new = [node for node in model.graph if node.metadata_props.get("cierzo.rule") == rule.name]
        assert [record.node for record in fused] == [node.name for node in new]
        for record, node in zip(fused, new, strict=True):
            assert record.error is not None
            assert record.precision is not None
            assert record.error <= TOLERANCES[record.precision]
            assert all(scopes[str(output.name)] == record.scope for output in node.outputs)
            assert record.scope.startswith("layers.") or record.scope in ("norm", "lm_head")
        check(bind(model))
        assert_same_step(want, run(bind(model), feeds), feeds["token_counts"])
    assert {name for name, value in model.graph.initializers.items() if is_unbound(value)} == weights
    assert [[str(v.name) for v in side] for side in (model.graph.inputs, model.graph.outputs)] == interface


def test_nothing_of_the_patterns_is_left(template: Template) -> None:
    model = template.model()
    report = pipeline.run(model, template.expected)
    assert report.counts == {rule: template.expected.get(rule, 0) for rule in RULES}
    assert report.proved
    assert report.largest_error is not None
    assert report.largest_error <= TOLERANCES["float64"]
    plain = [node for node in model.graph if node.domain == ""]
    gone = {"Expand", "Slice", "Neg", "Softmax", "ScatterElements", "GatherElements", "TopK", "Where", "Less", "Mod"}
    assert not gone & {node.op_type for node in plain}
    assert not any(node.outputs[0].dtype != ir.DataType.INT64 for node in plain if node.op_type == "Concat")
    for node in model.graph:
        for output in node.outputs:
            axes = set(dims(output)[:-1] if len(dims(output)) > 3 else ())
            slots = [str(dim) for dim in dims(output) if str(dim).startswith("S")]
            assert not (slots and "T" in axes), f"{output.name} is a mask or a score over {slots}"
    assert not any(output.dtype == ir.DataType.BOOL for node in model.graph for output in node.outputs)


def test_each_layer_has_its_window(dense: Template) -> None:
    model = dense.model()
    pipeline.run(model, dense.expected)
    attention = [node for node in model.graph if node.op_type == "RollingAttention"]
    windows = [(scope(node), node.attributes["window"].as_int()) for node in attention]
    assert windows == [("layers.0", 5), ("layers.1", 0)]
    assert {function.name for function in model.functions.values()} == {
        "RotaryEmbedding",
        "RollingKVWrite",
        "SlidingWindowAttention",
        "RollingAttention",
        "GatedActivation",
        "RMSNorm",
        "StoredMatMul",
    }


def test_the_mixture_has_its_experts(mixture: Template) -> None:
    model = mixture.model()
    pipeline.run(model, mixture.expected)
    (gate,) = [node for node in model.graph if node.op_type == "MoEGate"]
    (experts,) = [node for node in model.graph if node.op_type == "MixtureOfExperts"]
    assert gate.attributes["top_k"].as_int() == 2
    assert experts.attributes["activation"].as_string() == "silu"
    assert list(experts.inputs[1:3]) == list(gate.outputs)
    names = [f"layers.0.moe.{matrix}_proj" for matrix in ("gate", "up", "down")]
    assert [value.name for value in experts.inputs[3:] if value is not None] == names


def test_the_report_is_plain_data_and_the_same_for_equal_inputs(template: Template) -> None:
    models = [template.model() for _ in range(2)]
    texts = [json.dumps(pipeline.run(model, template.expected).to_json()) for model in models]
    assert texts[0] == texts[1]
    assert serialised(models[0]) == serialised(models[1])
    report = json.loads(texts[0])
    assert set(report) == {"proved", "largest_error", "counts", "passes", "fusions"}
    assert [entry["name"] for entry in report["passes"]] == ["canonicalise", *RULES]
    assert all("seconds" not in entry and entry["reason"] for entry in report["passes"])
    nodes = [(entry["nodes_before"], entry["nodes_after"]) for entry in report["passes"]]
    assert [after for _, after in nodes[:-1]] == [before for before, _ in nodes[1:]]
    assert nodes[0][0] == len(template.traced.graph) > nodes[-1][1] == len(models[0].graph)
    assert len(report["fusions"]) == sum(template.expected.values())
    for fusion in report["fusions"]:
        assert set(fusion) == {
            "rule",
            "op",
            "scope",
            "node",
            "replaced",
            "replaced_ops",
            "attributes",
            "error",
            "precision",
        }


def test_passes_are_dumped_as_files_that_load(template: Template, tmp_path: Path) -> None:
    dumped, plain, calls = template.model(), template.model(), list[tuple[str, int, int]]()
    pipeline.run(dumped, template.expected, dump_folder=tmp_path, progress=lambda *call: calls.append(call))
    pipeline.run(plain, template.expected)
    assert serialised(dumped) == serialised(plain)
    names = ["traced", "canonicalise", *RULES]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:02d}_{name}.onnx" for i, name in enumerate(names)]
    assert calls == [("fusing", i, len(names) - 1) for i in range(1, len(names))]
    sizes = []
    for path in sorted(tmp_path.iterdir()):
        onnx.checker.check_model(onnx.load(path), full_check=True)
        sizes.append(len(ir.from_proto(onnx.load(path)).graph))
    assert sizes[0] == len(template.traced.graph)
    assert sizes[-1] == len(plain.graph)
    assert sizes == sorted(sizes, reverse=True)


def test_a_dumped_graph_computes_the_step_when_given_the_weights(mixture: Template, tmp_path: Path) -> None:
    model, feeds = mixture.model(), mixture.feeds()
    pipeline.run(model, mixture.expected, dump_folder=tmp_path)
    bound = bind(model)
    want = run(bound, feeds)
    loaded = ir.from_proto(onnx.load(tmp_path / f"{len(RULES) + 1:02d}_{RULES[-1]}.onnx"))
    weights = {
        str(value.name): bound.graph.initializers[str(value.name)].const_value
        for value in loaded.graph.inputs
        if str(value.name) not in feeds
    }
    arrays = {name: np.asarray(tensor.numpy()) for name, tensor in weights.items() if tensor is not None}
    assert_same_step(want, run(loaded, {**feeds, **arrays}), feeds["token_counts"])


def test_without_proofs_the_graph_is_the_same_and_the_report_says_so(dense: Template) -> None:
    proved, hasty = dense.model(), dense.model()
    pipeline.run(proved, dense.expected)
    report = pipeline.run(hasty, dense.expected, proving=False)
    assert (report.proved, report.largest_error) == (False, None)
    assert all(fusion.error is None for fusion in report.fusions)
    assert op_types(proved) == op_types(hasty)
    assert json.loads(json.dumps(report.to_json()))["largest_error"] is None


@pytest.mark.parametrize(
    ("rule", "change", "reason"),
    [
        ("rope", 1, "fired 2 times in the traced template where 3 are due. The nearest match: from "),
        ("rope", -1, "fired 2 times in the traced template where 1 are due"),
        ("rolling_kv", 1, "not a scatter over the slot axis of a [B, G, S, D] buffer at ScatterElements"),
        ("gqa", 1, "not a softmax over the last axis of scores [..., T, S] at Softmax"),
        ("sliding_window", 1, "No node looked like its beginning"),
        ("moe_gate", -1, "'moe_gate' fired 1 times in the traced template where 0 are due"),
        ("moe", 1, "'moe' fired 1 times in the traced template where 2 are due"),
        ("rms_norm", 1, "not one factor is a weight [C] at Mul"),
        ("rolling_attention", 1, "No node looked like its beginning"),
        ("linear", 1, "'linear' fired 6 times in the traced template where 7 are due"),
    ],
)
def test_a_count_that_is_not_met_is_an_error_with_the_reasons(
    mixture: Template, rule: str, change: int, reason: str
) -> None:
    expected = {**mixture.expected, rule: mixture.expected[rule] + change}
    with pytest.raises(FusionError) as caught:
        pipeline.run(mixture.model(), expected)
    assert f"The fusion {rule!r} fired" in str(caught.value)
    assert reason in str(caught.value)
    assert "--dump-passes" in str(caught.value)


def test_a_rule_that_is_not_named_must_not_fire(mixture: Template) -> None:
    expected = {rule: count for rule, count in mixture.expected.items() if rule != "moe"}
    with pytest.raises(FusionError, match="The fusion 'moe' fired 1 times in the traced template where 0 are due"):
        pipeline.run(mixture.model(), expected)


def test_a_template_that_is_traced_differently_is_refused_with_the_place(mixture: Template) -> None:
    """One sign of the rotation is turned: the nearest match names module, node and the line of the model."""
    model = mixture.model()
    node = next(n for n in model.graph if n.op_type == "Sub" and len(dims(n.outputs[0])) == 4)
    node.op_type = "Add"
    with pytest.raises(FusionError, match=r"layers\.0.*but not the rotation by their angles at Mul '.*place\(query"):
        pipeline.run(model, mixture.expected)


def test_plugin_nodes_are_all_of_our_domain(template: Template) -> None:
    model = template.model()
    pipeline.run(model, template.expected)
    plugins = [node for node in model.graph if node.domain]
    assert {node.domain for node in plugins} == {DOMAIN}
    called = {op.name for op in ROLLING_ATTENTION.calls}  # whose nodes RollingAttention took in
    assert {node.op_type for node in plugins} == {function.name for function in model.functions.values()} - called
    assert model.opset_imports[DOMAIN] == 1
