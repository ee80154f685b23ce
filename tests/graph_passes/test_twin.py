"""Proof on a twin: what is carried over to the large graph, and every way in which the two must not differ."""

from __future__ import annotations

import re

import onnx_ir as ir
import pytest

from graph_passes.canonical import canonicalise
from graph_passes.driver import apply, apply_in_step
from graph_passes.driver_types import Rule
from graph_passes.fuse import gqa, moe, moe_gate, rope
from graph_passes.twin import Twin
from runtime.errors import ProofError
from tests.graph_passes.faults import attributes
from tests.graph_passes.texts import ATTENTION, EXPERTS, GATE, ROPE
from tests.support.graphs import canonical, mutate, parse, serialised


def sized(text: str, hidden: int, intermediate: int) -> str:
    """The experts' graph with other sizes; a Reshape holds the hidden size, as many programs do."""
    text = mutate(
        text,
        ("active = Mul (gate_x, sigmoid)", "raw = Mul (gate_x, sigmoid) keep = Constant <value_ints = [0, -1, 10]> () "
         "active = Reshape (raw, keep)"),
    )  # fmt: skip
    text = re.sub(r"\b12\b", str(hidden), text)
    return re.sub(r"\b10\b", str(intermediate), text)


def in_step(small: str, large: str, rule: Rule, *before: Rule) -> tuple[ir.Model, ir.Model, int]:
    twin, model = canonical(small), canonical(large)
    pair = Twin(twin, model)
    for earlier in before:
        assert apply_in_step(pair, model, earlier)[0]
    fused, _ = apply_in_step(pair, model, rule)
    return twin, model, len(fused)


def test_a_match_is_carried_over_to_the_large_graph() -> None:
    small, large = sized(EXPERTS, 12, 10), sized(EXPERTS, 4096, 14336)
    _, model, fused = in_step(small, large, moe.RULE)
    assert fused == 1
    (node,) = [node for node in model.graph if node.domain == "cierzo"]
    assert node.op_type == "MixtureOfExperts"
    assert [str(v.name) for v in node.inputs if v is not None] == ["x", "weight", "expert", "gate", "up", "down"]
    assert node.metadata_props["cierzo.proof_precision"] == "float64"


@pytest.mark.parametrize(
    ("text", "rule"), [(ROPE, rope.RULE), (ATTENTION, gqa.RULE), (GATE, moe_gate.RULE)], ids=["rope", "gqa", "gate"]
)
def test_both_come_out_as_if_rewritten_alone(text: str, rule: Rule) -> None:
    alone = canonical(text)
    assert apply(alone, rule)[0]
    twin, model, _ = in_step(text, text, rule)
    assert serialised(twin) == serialised(model) == serialised(alone)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("sigmoid = Sigmoid (gate_x)", "sigmoid = Tanh (gate_x)"), "Sigmoid 'node_.*' is Tanh"),
        (("gated = Mul (active, up_x)", "gated = Mul (up_x, active)"), "MatMul .* is Reshape"),
        (("<value_float = 0.0>", "<value_float = 1.0>"), r"constants '\w+' are 0.0 and 1.0"),
        (("ScatterElements <axis = 1>", "ScatterElements <axis = 1, reduction = \"add\">"), "has other attributes"),
        (("keep = Constant <value_ints = [0, -1, 9]>", "keep = Constant <value_ints = [0, -1, 10]>"), "only one .* has a shape|9 stands for 9 elsewhere and for 10"),
        (("float[N,2] weight", "float[N,3] weight"), "2 stands for 3 elsewhere and for 2"),
        (("up_x = MatMul (x, up_t)", "up_0 = MatMul (x, up_t) up_x = Neg (up_0)"), "the small twin has 'node_.*' and the model has not"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_its_twin_is_refused(change: tuple[str, str], reason: str) -> None:
    small = sized(EXPERTS, 7, 9)
    twin, model = canonical(small), parse(mutate(small, change))
    canonicalise(model)
    by_value = {str(v.name) for node in twin.graph for v in node.outputs}
    for node, other in zip(model.graph, twin.graph, strict=False):  # names as one tracer would have given them
        if {str(v.name) for v in node.outputs} <= by_value:
            node.name = next(n.name for n in twin.graph if n.outputs[0].name == node.outputs[0].name)
        assert other is not None
    untouched = serialised(model)
    with pytest.raises(ProofError, match=reason):
        apply_in_step(Twin(twin, model), model, moe.RULE)
    assert serialised(model) == untouched


def test_a_fault_is_caught_on_the_twin_and_the_model_left_alone() -> None:
    twin, model = canonical(sized(EXPERTS, 12, 10)), canonical(sized(EXPERTS, 4096, 14336))
    untouched = serialised(model)
    faulty = Rule("moe", moe.RULE.op, moe.RULE.anchors, lambda m, a: attributes(activation="gelu")(moe.match(m, a)))
    with pytest.raises(ProofError, match="does not compute what the graph computed before"):
        apply_in_step(Twin(twin, model), model, faulty)
    assert serialised(model) == untouched


def test_a_value_that_only_the_twin_has_is_named() -> None:
    twin, model = canonical(GATE), canonical(GATE.replace("logits", "scores"))
    with pytest.raises(ProofError, match="the small twin has 'logits' and the model has not"):
        apply_in_step(Twin(twin, model), model, moe_gate.RULE)
