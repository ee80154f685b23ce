"""Proof on a twin: what is carried over to the large graph, and every way in which the two must not differ."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.canonical import canonicalise
from graph_passes.driver import apply, apply_in_step
from graph_passes.driver_types import Rule
from graph_passes.fuse import gqa, moe, moe_gate, rope
from graph_passes.twin import Twin
from runtime.errors import ProofError
from tests.graph_passes.faults import attributes
from tests.graph_passes.gallery.tracing import trace
from tests.graph_passes.texts import ATTENTION, EXPERTS, GATE, ROPE
from tests.support.graphs import canonical, mutate, parse, run, serialised


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
        (("gated = Mul (active, up_x)", "gated = Mul (up_x, active)"), r"'up_x' has an extent of N and \?active"),
        (("<value_float = 0.0>", "<value_float = 1.0>"), r"constants '\w+' are 0.0 and 1.0"),
        (("ScatterElements <axis = 1>", "ScatterElements <axis = 1, reduction = \"add\">"), "has other attributes"),
        (("keep = Constant <value_ints = [0, -1, 9]>", "keep = Constant <value_ints = [0, -1, 10]>"),
         "only one .* has a shape|9 stands for 9 elsewhere and for 10"),
        (("float[N,2] weight", "float[N,3] weight"), "2 stands for 3 elsewhere and for 2"),
        (("up_x = MatMul (x, up_t)", "up_0 = MatMul (x, up_t) up_x = Neg (up_0)"),
         "the small twin has 'node_.*' and the model has not"),
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


def other_tokens(large: str) -> str:
    """Gate and up read two values of one shape, where the twin's read one."""
    return mutate(large, (" x, float[N,2] weight", " x, float[N,7] z, float[N,2] weight"), ("(x, up_t)", "(z, up_t)"))


def test_one_value_of_the_twin_is_not_two_of_the_model() -> None:
    small = sized(EXPERTS, 7, 9)
    twin, model = canonical(small), canonical(other_tokens(small))
    with pytest.raises(ProofError, match="'x' is 'x' in one place and 'z' in another"):
        apply_in_step(Twin(twin, model), model, moe.RULE)


def test_another_output_of_one_node_is_another_value() -> None:
    halves = "first, second = Split <axis = 2, num_outputs = 2> (gated) joined = Concat <axis = 2> (first, second)"
    text = mutate(EXPERTS, ("out = MatMul (gated", f"{halves} out = MatMul (joined"))
    twin, model = canonical(text), canonical(mutate(text, ("(first, second)", "(second, first)")))
    with pytest.raises(ProofError, match="is another output of"):
        apply_in_step(Twin(twin, model), model, moe.RULE)


def test_an_attribute_of_another_length_is_another_attribute() -> None:
    twin, model = canonical(EXPERTS), canonical(EXPERTS)
    transpose = next(node for node in model.graph if node.op_type == "Transpose")
    transpose.attributes["perm"] = ir.AttrInt64s("perm", [1, 0, 2, 3])
    with pytest.raises(ProofError, match=r"perm of 'node_.*' is "):
        apply_in_step(Twin(twin, model), model, moe.RULE)


def wide_tokens(hidden: int, intermediate: int) -> ir.Model:
    """Experts that take their tokens [B, T, C] as [N, 1, C]: nothing in the graph is [N, C] but for the router."""

    def program(x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weight, expert = (x.flatten(0, 1) @ router.T).softmax(-1).topk(2)
        weight = weight / weight.sum(-1, keepdim=True)
        row = x.reshape(-1, 1, x.shape[2])
        unit = F.silu(row @ gate[:, None].mT) * (row @ up[:, None].mT) @ down[:, None].mT
        return torch.einsum("enoc,ne->nc", unit, torch.zeros(row.shape[0], 4).scatter(1, expert, weight))

    stacks = {"gate": (4, intermediate, hidden), "up": (4, intermediate, hidden), "down": (4, hidden, intermediate)}
    return trace(program, {"x": ("B", "T", hidden), "router": (4, hidden), **stacks}, ["y"])


def test_tokens_are_flattened_by_nodes_that_hold_no_size() -> None:
    twin, model = wide_tokens(12, 10), wide_tokens(20, 28)
    pair = Twin(twin, model)
    for rule in (moe_gate.RULE, moe.RULE):
        fused, refused = apply_in_step(pair, model, rule)
        assert len(fused) == 1, [str(record) for record in refused]
    (experts,) = [node for node in model.graph if node.op_type == "MixtureOfExperts"]
    assert experts.inputs[0] is not None
    assert list(experts.inputs[0].shape or ())[1] == 20
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3, 20), "router": (4, 20), "gate": (4, 28, 20), "up": (4, 28, 20), "down": (4, 20, 28)}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    np.testing.assert_allclose(run(model, arrays)["y"], run(wide_tokens(20, 28), arrays)["y"], rtol=1e-5, atol=1e-4)


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
