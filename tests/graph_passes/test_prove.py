"""The prover and the driver: right matches pass, deliberate faults are caught before anything is changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.driver import apply
from graph_passes.driver_types import Match
from graph_passes.fuse import gqa, moe, moe_gate, rope
from graph_passes.graph import Refusal
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.moe_gate import MOE_GATE
from graph_passes.prove import difference, prove
from graph_passes.region import Region
from runtime.errors import FusionError, ProofError
from tests.graph_passes.faults import attributes, body
from tests.graph_passes.texts import ATTENTION, EXPERTS, GATE, ROPE, fuse
from tests.support.graphs import canonical, mutate, op_types, serialised, statements


def test_the_proof_is_the_same_every_time() -> None:
    errors = {fuse(ATTENTION, gqa.RULE)[1][0].error for _ in range(3)}
    assert len(errors) == 1


def test_what_cannot_be_run_is_no_proof() -> None:
    broken = body(("Softmax <axis = -1>", "NoSuchOperator"))
    rule = replace(moe_gate.RULE, match=lambda model, anchor: broken(moe_gate.match(model, anchor)))
    with pytest.raises(ProofError, match="nodes before and after cannot be run on their own: the region is no graph"):
        fuse(GATE, rule)


def test_a_region_that_needs_more_than_the_op_s_inputs_is_no_proof() -> None:
    text = mutate(
        GATE,
        ("float[N,4] logits", "float[N,4] logits, float[N,4] bias"),
        ("(logits)", "(biased)"),
        ("probability =", "biased = Add (logits, bias) probability ="),
    )
    model = canonical(text)
    (anchor,) = [node for node in model.graph if node.op_type == "TopK"]
    match = moe_gate.match(model, anchor)
    with pytest.raises(ProofError, match="the region also needs the data of 'bias'"):
        prove(model, replace(match, inputs=(model.graph.inputs[0],)))


def test_an_example_of_another_rank_is_no_proof() -> None:
    model = canonical(ROPE)
    region = Region(model, list(model.graph.inputs), list(model.graph.outputs))
    with pytest.raises(Refusal, match="'x' has 4 axes and is given 3"):
        region.run([np.zeros((2, 3, 6), np.float32)] + [np.zeros((2, 3, 3), np.float32)] * 2)


def test_a_value_of_unknown_type_is_no_proof() -> None:
    model = canonical(ROPE)
    model.graph.inputs[0].type = ir.TensorType(None)  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="the region is no graph of its own"):
        Region(model, list(model.graph.inputs), list(model.graph.outputs))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], np.inf),
        ([1.0, np.nan], [1.0, np.nan], np.inf),
        ([1.0, 2.0], [1.0, np.inf], np.inf),
        ([1.0, 2.0], [1, 2], np.inf),
        ([1.0, 2.0], [[1.0, 2.0]], np.inf),
        ([1, 2], [1, 2], 0.0),
        ([1, 2], [1, 3], np.inf),
        ([True], [False], np.inf),
    ],
)
def test_difference(old: list[float], new: list[float], expected: float) -> None:
    assert difference(np.array(old), np.array(new)) == expected


def test_without_proving_no_error_is_recorded() -> None:
    model, (record,) = fuse(ROPE, rope.RULE, proving=False)
    assert record.error is None
    assert "cierzo.proof_error" not in model.graph[0].metadata_props


def test_without_proving_a_fault_goes_through() -> None:
    """What the proof is for: the matcher's own checks do not look at an op's body."""
    rule = replace(rope.RULE, match=lambda model, anchor: attributes(interleaved=1)(rope.match(model, anchor)))
    model, _ = fuse(ROPE, rule, proving=False)
    assert op_types(model) == ["RotaryEmbedding"]


def test_names_and_the_tracer_s_metadata_are_kept() -> None:
    model = canonical(ROPE)
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'layers.0', 'layers.0.self_attn', '{node.name}']"
    anchor, output = model.graph[-1], model.graph.outputs[0]
    name, scopes = anchor.name, dict(anchor.metadata_props)
    ((record,), _) = apply(model, rope.RULE)
    (node,) = model.graph
    assert (node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype) == ("y", output.shape, output.dtype)
    assert model.graph.outputs[0] is node.outputs[0]
    assert scopes.items() <= node.metadata_props.items()
    assert node.metadata_props["cierzo.rule"] == "rope"
    assert float(node.metadata_props["cierzo.proof_error"]) == pytest.approx(record.error, rel=1e-2)
    assert node.metadata_props["cierzo.replaced"].split(",") == list(record.replaced)
    assert len(record.replaced) == 11
    assert (record.scope, record.node) == ("layers.0.self_attn", f"{name}__RotaryEmbedding")


def test_anchors_that_do_not_match_are_reported_with_reason_and_scope() -> None:
    model = canonical("g (float[B,2] x) => (float[B,4] y) { y = Concat <axis = 1> (x, x) }")
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.1', 'cat']"
    fused, (record,) = apply(model, rope.RULE)
    assert fused == []
    assert (record.rule, record.scope) == ("rope", "layers.1")
    assert record.reason.startswith("the result is not [B, H, T, D] with a fixed head dim at Concat ")


TWO_ROUTES = EXPERTS.replace("int64[N,2] expert,", "int64[N,2] expert, float[N,2] weight_2, int64[N,2] expert_2,")


def test_a_matcher_that_stumbles_has_refused_and_says_so() -> None:
    def stumble(model: ir.Model, anchor: ir.Node) -> Match:
        raise IndexError("list index out of range")

    model = canonical(GATE)
    untouched = serialised(model)
    fused, (record,) = apply(model, replace(moe_gate.RULE, match=stumble))
    assert fused == []
    assert record.reason.startswith("the matcher itself failed with IndexError (list index out of range)")
    assert serialised(model) == untouched


TWO_MIXTURES = TWO_ROUTES.replace("    y = ReduceSum", "    x_2 = ReduceSum").replace("}", "") + "\n".join(
    f"    {line.strip()}"
    for line in """
    scattered_2 = ScatterElements <axis = 1> (nothing, expert_2, weight_2)
    other_EN = Transpose <perm = [1, 0]> (scattered_2)
    other_EN1 = Unsqueeze (other_EN, axis_2)
    gate_x_2 = MatMul (x_2, gate_t)
    up_x_2 = MatMul (x_2, up_t)
    active_2 = Relu (gate_x_2)
    gated_2 = Mul (active_2, up_x_2)
    out_2 = MatMul (gated_2, down_t)
    weighted_2 = Mul (out_2, other_EN1)
    y = ReduceSum <keepdims = 0> (weighted_2, axis_0)
}""".splitlines()
)


def test_two_nodes_that_need_different_bodies_are_refused() -> None:
    with pytest.raises(FusionError, match="needs another function body of MixtureOfExperts than an earlier one"):
        fuse(TWO_MIXTURES, moe.RULE)


def test_two_nodes_of_one_body_share_it() -> None:
    same = mutate(
        TWO_MIXTURES, ("active_2 = Relu (gate_x_2)", "s_2 = Sigmoid (gate_x_2) active_2 = Mul (s_2, gate_x_2)")
    )
    model, records = fuse(same, moe.RULE)
    assert op_types(model) == ["MixtureOfExperts"] * 2
    assert len(records) == 2
    assert len(model.functions) == 1
    assert statements(model)[1] == "y = cierzo.MixtureOfExperts(x_2, weight_2, expert_2, gate, up, down)"


def test_a_match_of_the_wrong_shapes_cannot_be_made() -> None:
    """Contradictions are rejected at construction: rank, and extents that differ within the op."""
    vector = ir.Value(name="v", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N"]))
    logits = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 4]))
    weight = ir.Value(name="weight", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 2]))
    expert = ir.Value(name="expert", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["N", 3]))
    anchor = ir.node("TopK", [logits])
    with pytest.raises(Refusal, match="'v' has 1 axes where logits_NE is needed"):
        Match("moe_gate", MOE_GATE, anchor, (vector,), {"top_k": 2}, (weight, expert))
    with pytest.raises(Refusal, match=r"K is 3 in 'expert' \(expert_NK\) and 2 elsewhere"):
        Match("moe_gate", MOE_GATE, anchor, (logits,), {"top_k": 2}, (weight, expert))
    assert MIXTURE_OF_EXPERTS.outputs == ("y_NC",)
