"""The prover and the driver: right matches pass, deliberate faults are caught before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.driver import apply
from graph_passes.driver_types import Match, Rule
from graph_passes.fuse import gqa, moe, moe_gate, rolling_kv, rope, sliding_window
from graph_passes.graph import Refusal
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.moe_gate import MOE_GATE
from graph_passes.prove import TOLERANCES, difference, prove
from runtime.errors import FusionError, ProofError
from tests.graph_passes.texts import ATTENTION, EXPERTS, GATE, GATE_TOP_K_FIRST, RING, ROPE, fuse
from tests.support.graphs import canonical, mutate, op_types, serialised, statements

Change = Callable[[Match], Match]


@dataclass(frozen=True, slots=True)
class Place:
    """A graph in which the last of the rules fires, the others before it."""

    text: str
    rules: tuple[Rule, ...]


PLACES = {
    "rope": Place(ROPE, (rope.RULE,)),
    "ring": Place(RING, (rolling_kv.RULE,)),
    "attention": Place(ATTENTION, (gqa.RULE,)),
    "window": Place(ATTENTION, (gqa.RULE, sliding_window.RULE)),
    "window 1": Place(mutate(ATTENTION, ("<value_int = 5>", "<value_int = 1>")), (gqa.RULE, sliding_window.RULE)),
    "no window": Place(mutate(ATTENTION, ("And (seen, near)", "Identity (seen)")), (gqa.RULE, sliding_window.RULE)),
    "gate": Place(GATE, (moe_gate.RULE,)),
    "gate, top-k first": Place(GATE_TOP_K_FIRST, (moe_gate.RULE,)),
    "experts": Place(EXPERTS, (moe.RULE,)),
}


def attributes(**changed: int | float | str) -> Change:
    return lambda match: replace(match, attributes={**match.attributes, **changed})


def scaled(factor: float) -> Change:
    return lambda match: replace(
        match, attributes={**match.attributes, "scale": float(match.attributes["scale"]) * factor}
    )


def inputs(*order: int) -> Change:
    return lambda match: replace(match, inputs=tuple(match.inputs[index] for index in order))


def body(*replacements: tuple[str, str]) -> Change:
    """The op with another function body, as if the one in the file were wrong."""

    def change(match: Match) -> Match:
        def faulty(given: Mapping[str, int | float | str]) -> str:
            return mutate(match.op.body(given), *replacements)

        return replace(match, op=replace(match.op, body=faulty))

    return change


TILED = """
    key_BHSD = Concat <axis = 1> (key_BGSD, key_BGSD)
    value_BHSD = Concat <axis = 1> (value_BGSD, value_BGSD)
    attended_BHTD = """
FAULTS: dict[str, tuple[str, Change]] = {
    "interleaved halves": ("rope", attributes(interleaved=1)),
    "cosine and sine exchanged": ("rope", inputs(0, 2, 1)),
    "one cosine for both": ("rope", inputs(0, 1, 1)),
    "count instead of start": ("ring", inputs(0, 1, 3, 3)),
    "start instead of count": ("ring", inputs(0, 1, 2, 2)),
    "start and count exchanged": ("ring", inputs(0, 1, 3, 2)),
    "one slot further": ("ring", body(("Add (start_B1, offset_T)", "Sub (start_B1, offset_T)"))),
    "padding is written": ("ring", body(("Where (valid_B1T1, new_BGTD, held_BGTD)", "Identity (new_BGTD)"))),
    "padding is zeroed": ("ring", body(("Less (offset_T, count_B1)", "LessOrEqual (offset_T, count_B1)"))),
    "scale a thousandth larger": ("attention", scaled(1.001)),
    "scale left away": ("attention", attributes(scale=1.0)),
    "key and value exchanged": ("attention", inputs(0, 2, 1, 3)),
    "key for value": ("attention", inputs(0, 1, 1, 3)),
    "heads grouped round robin": (
        "attention",
        body(("attended_BHTD = ", TILED), ("key_BGSD, value_BGSD, visible", "key_BHSD, value_BHSD, visible")),
    ),
    "no mask": ("attention", body((", visible_B1TS)", ")"))),
    "window one wider": ("window", attributes(window=6)),
    "window one narrower": ("window", attributes(window=4)),
    "window left away": ("window", attributes(window=0)),
    "window 2 for 1": ("window 1", attributes(window=2)),
    "full for window 1": ("window 1", attributes(window=0)),
    "window for full attention": ("no window", attributes(window=7)),
    "scale a thousandth smaller": ("window", scaled(0.999)),
    "key and value rings exchanged": ("window", inputs(0, 2, 1, 3, 4)),
    "start and count of attention exchanged": ("window", inputs(0, 1, 2, 4, 3)),
    "count for start": ("window", inputs(0, 1, 2, 4, 4)),
    "slots count as positions": ("window", body(("Sub (last_B1, age_BS)", "Add (age_BS, zero)"))),
    "empty slots are seen": ("window", body(("And (written, causal_inside)", "Identity (causal_inside)"))),
    "the future is seen": ("window", body(("And (causal, inside)", "Identity (inside)"))),
    "one expert fewer": ("gate", attributes(top_k=1)),
    "one expert more": ("gate", attributes(top_k=3)),
    "not renormalised": ("gate", body(("Div (best_NK, total_N1)", "Identity (best_NK)"))),
    "worst experts": ("gate", body(("TopK <axis = -1>", "TopK <axis = -1, largest = 0>"))),
    "one expert more, top-k first": ("gate, top-k first", attributes(top_k=3)),
    "not renormalised, top-k first": ("gate, top-k first", body(("Div (best_NK, total_N1)", "Identity (best_NK)"))),
    **{
        f"{name} for silu": ("experts", attributes(activation=name))
        for name in ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh")
    },
    "gate and up exchanged": ("experts", inputs(0, 1, 2, 4, 3, 5)),
    "gate for both": ("experts", inputs(0, 1, 2, 3, 3, 5)),
    "all experts alike": (
        "experts",
        body(
            ("(nothing_NE, expert_NK, weight_NK)", "(nothing_NE, first, weight_NK)"),
            ("axis_0 =", "first = Sub (expert_NK, expert_NK) axis_0 ="),
        ),
    ),
    "weights left away": ("experts", body(("Mul (out_ENC, weight_EN1)", "Identity (out_ENC)"))),
}


BLIND = {
    "one cosine for both",
    "count instead of start",
    "start instead of count",
    "key for value",
    "count for start",
    "gate for both",
}
"""Faults that leave out a value which the graph reads: the proof has nothing to feed it with."""


@pytest.mark.parametrize("name", PLACES)
def test_a_right_match_passes(name: str) -> None:
    place = PLACES[name]
    *_, record = fuse(place.text, *place.rules)[1]
    assert record.error is not None
    assert 0 <= record.error <= TOLERANCES["float32"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_the_graph_left_alone(fault: str) -> None:
    name, change = FAULTS[fault]
    place = PLACES[name]
    model, *_ = fuse(place.text, *place.rules[:-1]) if place.rules[:-1] else (canonical(place.text),)
    untouched = serialised(model)
    rule = place.rules[-1]
    faulty = replace(rule, match=lambda model, anchor: change(rule.match(model, anchor)))
    with pytest.raises(ProofError, match=f"{rule.name} in the model") as caught:
        apply(model, faulty)
    expected = (
        "the region also needs the data of" if fault in BLIND else "does not compute what the graph computed before"
    )
    assert expected in str(caught.value)
    assert serialised(model) == untouched
    assert apply(model, rule)[0]


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
    ((record,), refused) = apply(model, rope.RULE)
    (node,) = model.graph
    assert refused == []
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
    assert record.reason.startswith("not a Concat of two halves along the last of four axes at Concat ")


TWO_MIXTURES = EXPERTS.replace("    y = ReduceSum", "    x_2 = ReduceSum").replace("}", "") + "\n".join(
    f"    {line.strip()}"
    for line in """
    gate_x_2 = MatMul (x_2, gate_t)
    up_x_2 = MatMul (x_2, up_t)
    active_2 = Relu (gate_x_2)
    gated_2 = Mul (active_2, up_x_2)
    out_2 = MatMul (gated_2, down_t)
    weighted_2 = Mul (out_2, weight_EN1)
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
    assert statements(model)[1] == "y = cierzo.MixtureOfExperts(x_2, weight, expert, gate, up, down)"


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
