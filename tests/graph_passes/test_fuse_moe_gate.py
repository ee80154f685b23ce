"""MoE gate: both spellings become one MoEGate node; why others do not."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.fuse import moe_gate
from tests.graph_passes.texts import GATE, GATE_TOP_K_FIRST, fuse, refusal
from tests.support.graphs import Arrays, assert_same_outputs, mutate, parse, statements

FUSED = ["weight, expert = cierzo.MoEGate(logits)"]


def feeds() -> Arrays:
    """Spread logits, ties within and across the border of the best two, and a lone favourite."""
    spread = 3 * np.random.default_rng(0).standard_normal((6, 4), dtype=np.float32)
    ties = np.array([[1, 1, 1, 1], [0, 2, 2, 2], [2, 0, 1, 1], [40, 0, 0, 0]], np.float32)
    return {"logits": np.concatenate([spread, ties])}


@pytest.mark.parametrize("text", [GATE, GATE_TOP_K_FIRST], ids=["softmax first", "top-k first"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_fuses(text: str, top_k: int) -> None:
    text = mutate(text, ("[2]", f"[{top_k}]")).replace("[N,2]", f"[N,{top_k}]")
    model, (record,) = fuse(text, moe_gate.RULE)
    assert statements(model) == FUSED
    assert record.attributes == {"top_k": top_k}
    assert record.error is not None
    assert record.error < 1e-6
    assert_same_outputs(parse(text), model, feeds())


@pytest.mark.parametrize(
    "spelling",
    [
        [("axis = Constant <value_ints = [-1]>", "axis = Constant <value_ints = [1]>")],
        [
            ("Softmax <axis = -1>", "Softmax <axis = 1>"),
            ("TopK <axis = -1>", "TopK <axis = 1, largest = 1, sorted = 1>"),
        ],
        [("ReduceSum <keepdims = 1>", "ReduceSum")],
    ],
)
def test_fuses_other_spellings(spelling: list[tuple[str, str]]) -> None:
    text = mutate(GATE, *spelling)
    model, _ = fuse(text, moe_gate.RULE)
    assert statements(model) == FUSED
    assert_same_outputs(parse(text), model, feeds())


def test_a_reader_between_top_k_and_division_comes_after_the_new_node() -> None:
    text = mutate(
        GATE, ("total =", "next = Neg (expert) total ="), ("int64[N,2] expert", "int64[N,2] expert, int64[N,2] next")
    )
    model, _ = fuse(text, moe_gate.RULE)
    assert statements(model) == [*FUSED, "next = Neg(expert)"]
    assert_same_outputs(parse(text), model, feeds())


@pytest.mark.parametrize(
    ("text", "fault", "reason"),
    [
        (
            GATE,
            [("float[N,4] logits", "float[N,4] logits, int64[1] given"), ("(probability, k)", "(probability, given)")],
            "the number of experts per token is not a constant",
        ),
        (GATE, [("TopK <axis = -1>", "TopK <axis = -1, largest = 0>")], "TopK takes the smallest probabilities"),
        (
            GATE,
            [("Softmax <axis = -1>", "Softmax <axis = 0>")],
            "the Softmax does not run over the experts of [N, E] logits",
        ),
        (
            GATE.replace("[N,2]", "[2,4]").replace("float[N,4]", "float[3,4]"),
            [("TopK <axis = -1>", "TopK <axis = 0>")],
            "the TopK does not run over the experts of [N, E] logits",
        ),
        (
            GATE_TOP_K_FIRST.replace("[N,2]", "[B,N,2]").replace("float[N,4]", "float[B,N,4]"),
            [],
            "the TopK does not run over the experts of [N, E] logits",
        ),
        (
            GATE.replace("[N,2]", "[N,0]"),
            [("k = Constant <value_ints = [2]>", "k = Constant <value_ints = [0]>")],
            "0 of 4 experts",
        ),
        (GATE, [("float[N,4] logits", "float[N,E] logits")], "axis 1 of 'logits' is E, but must be a fixed size"),
        (GATE, [("Div (best, total)", "Sqrt (best)")], "the best probabilities are not renormalised by one division"),
        (
            GATE,
            [("Div (best, total)", "Div (total, best)")],
            "the best probabilities are not renormalised by one division",
        ),
        (
            GATE,
            [("total = ReduceSum", "total = ReduceMax")],
            "'total' should come from ReduceSum, but comes from ReduceMax",
        ),
        (GATE, [("> (best, axis)", "> (probability, axis)")], "the divisor is not the sum of the best probabilities"),
        (GATE, [("value_ints = [-1]", "value_ints = [0]")], "the divisor is not the sum of the best probabilities"),
        (
            GATE,
            [("weight =", "raw = Neg (best) weight ="), ("float[N,2] weight", "float[N,2] raw, float[N,2] weight")],
            "the unnormalised probabilities are read elsewhere too",
        ),
        (
            GATE,
            [("float[N,2] weight", "float[N,2] best, float[N,2] weight")],
            "the unnormalised probabilities are read elsewhere too",
        ),
        (
            GATE_TOP_K_FIRST,
            [
                ("weight = Softmax", "raw = Neg (best) weight = Softmax"),
                ("float[N,2] weight", "float[N,2] raw, float[N,2] weight"),
            ],
            "'best' has 2 readers, but must have one",
        ),
        (
            GATE_TOP_K_FIRST,
            [("weight = Softmax <axis = -1>", "weight = Sigmoid")],
            "'best' should go into Softmax, but goes into Sigmoid",
        ),
        (
            GATE_TOP_K_FIRST,
            [("weight = Softmax <axis = -1>", "weight = Softmax <axis = 0>")],
            "the Softmax does not run over the experts",
        ),
    ],
)
def test_refuses(text: str, fault: list[tuple[str, str]], reason: str) -> None:
    assert reason in refusal(mutate(text, *fault), moe_gate.RULE)
