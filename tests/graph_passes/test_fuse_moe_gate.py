"""MoE gate: spellings become one MoEGate node; why others do not. Those that PyTorch makes are in the gallery."""

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
    "spelling",
    [
        [("Softmax <axis = -1> (logits)", "Exp (logits)")],
        [("total = ReduceSum <keepdims = 1> (best, axis)", "total = ReduceL1 <keepdims = 1> (best, axis)")],
        [
            ("(logits)\n", "(logits) shares = LogSoftmax <axis = -1> (logits)\n"),
            ("(probability, k)", "(shares, k)"),
            ("total =", "odds = Exp (best) total ="),
            ("(best, axis)", "(odds, axis)"),
            ("(best, total)", "(odds, total)"),
        ],
        [
            ("weight = Div", "share = Div"),
            (
                "(best, total)",
                "(best, total) whole = ReduceSum <keepdims = 1> (share, axis) weight = Div (share, whole)",
            ),
        ],
        [("weight = Div (best, total)", "part = Reciprocal (total) weight = Mul (part, best)")],
    ],
    ids=["exp alone", "sum of magnitudes", "logarithms", "divided twice", "reciprocal"],
)
def test_fuses_another_arithmetic(spelling: list[tuple[str, str]]) -> None:
    text = mutate(GATE, *spelling)
    model, (record,) = fuse(text, moe_gate.RULE)
    assert statements(model) == FUSED
    assert record.error is not None
    assert record.error < 1e-6
    assert_same_outputs(parse(text), model, feeds())


NOT_RENORMALISED = "the weights are not renormalised: they are shares among all experts, not among the chosen"
READ = "the unnormalised probabilities are read elsewhere too"
CUT = """g (float[N,4] logits) => (float[N,2] weight, int64[N,2] expert) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    best, order = TopK <axis = -1> (logits, three)
    first = Slice (best, zero, two, one, one)
    expert = Slice (order, zero, two, one, one)
    weight = Softmax <axis = -1> (first)
}"""
"""The first two of the best three."""

GATHERED = """g (float[N,4] logits) => (float[N,2] weight, int64[N,2] expert) {
    k = Constant <value_ints = [2]> ()
    axis = Constant <value_ints = [-1]> ()
    probability = Softmax <axis = -1> (logits)
    _, expert = TopK <axis = -1> (logits, k)
    best = GatherElements <axis = 1> (probability, expert)
    total = ReduceSum <keepdims = 1> (best, axis)
    weight = Div (best, total)
}"""
"""Chosen by the logits, weighed by the probabilities."""


@pytest.mark.parametrize("text", [CUT, GATHERED], ids=["first of the best", "gathered"])
def test_fuses_what_the_negatives_below_begin_with(text: str) -> None:
    model, _ = fuse(text, moe_gate.RULE)
    assert statements(model) == FUSED
    assert_same_outputs(parse(text), model, feeds())


@pytest.mark.parametrize(
    ("text", "fault", "reason"),
    [
        (
            GATE,
            [("float[N,4] logits", "float[N,4] logits, int64[1] given"), ("(probability, k)", "(probability, given)")],
            "the number of experts per token is not a constant",
        ),
        (GATE, [("TopK <axis = -1>", "TopK <axis = -1, largest = 0>")], "TopK takes the smallest scores"),
        (
            GATE,
            [("Softmax <axis = -1>", "Softmax <axis = 0>")],
            "it does not choose the experts with the largest logits, best first",
        ),
        (
            GATE.replace("[N,2]", "[2,4]").replace("float[N,4]", "float[3,4]"),
            [("TopK <axis = -1>", "TopK <axis = 0>")],
            "the TopK does not run over the last axis, the experts of [N, E] logits",
        ),
        (
            GATE_TOP_K_FIRST.replace("[N,2]", "[B,N,2]").replace("float[N,4]", "float[B,N,4]"),
            [],
            "weights and experts are [B, N, 2] and are never made [N, K]",
        ),
        (
            GATE.replace("[N,2]", "[N,0]"),
            [("k = Constant <value_ints = [2]>", "k = Constant <value_ints = [0]>")],
            "it chooses 0 of 4 experts",
        ),
        (
            GATE,
            [("float[N,4] logits", "float[N,E] logits")],
            "the number of experts is E, but must be a fixed size",
        ),
        (
            GATE_TOP_K_FIRST.replace("float[", "float16["),
            [],
            "there are no float32 logits [N, E] behind it",
        ),
        (GATE, [("Div (best, total)", "Sqrt (best)")], "Sqrt changes the weights after TopK, and is no part of a gate"),
        (GATE, [("Div (best, total)", "Div (total, best)")], NOT_RENORMALISED),
        (GATE, [("total = ReduceSum", "total = ReduceMax")], NOT_RENORMALISED),
        (GATE, [("> (best, axis)", "> (probability, axis)")], NOT_RENORMALISED),
        (GATE, [("value_ints = [-1]", "value_ints = [0]")], NOT_RENORMALISED),
        (
            GATE,
            [("weight =", "raw = Neg (best) weight ="), ("float[N,2] weight", "float[N,2] raw, float[N,2] weight")],
            READ,
        ),
        (GATE, [("float[N,2] weight", "float[N,2] best, float[N,2] weight")], READ),
        (
            GATE_TOP_K_FIRST,
            [
                ("weight = Softmax", "raw = Neg (best) weight = Softmax"),
                ("float[N,2] weight", "float[N,2] raw, float[N,2] weight"),
            ],
            READ,
        ),
        (
            CUT,
            [("int64[N,2] expert", "int64[N,2] expert, int64[N,3] order")],
            "the expert numbers of TopK are read elsewhere too",
        ),
        (
            CUT,
            [
                ("Slice (best, zero, two, one, one)", "Exp (best)"),
                ("Softmax <axis = -1>", "Exp"),
                ("[N,2] w", "[N,3] w"),
            ],
            "no weights are made for the 2 experts that are chosen",
        ),
        (
            GATE_TOP_K_FIRST,
            [("weight = Softmax <axis = -1>", "weight = Sigmoid")],
            "Sigmoid changes the weights after TopK, and is no part of a gate",
        ),
        (
            GATE_TOP_K_FIRST,
            [("weight = Softmax <axis = -1>", "weight = Softmax <axis = 0>")],
            "the weights 'weight' are not the softmax over the best 2 of 'logits' (off by",
        ),
        (
            GATE_TOP_K_FIRST,
            [
                ("= TopK <axis = -1> (logits, k)", "= TopK <axis = -1> (shifted, k)"),
                (
                    "best, expert",
                    "slope = Constant <value_floats = [0.0, 1.0, 2.0, 3.0]> () "
                    "shifted = Add (logits, slope) best, expert",
                ),
                ("Softmax <axis = -1> (best)", "Softmax <axis = -1> (raw)"),
                ("weight =", "raw = GatherElements <axis = 1> (logits, expert) weight ="),
            ],
            "the experts are chosen by 'shifted', which comes from Add, but the weights are made of more ('logits')",
        ),
        (
            GATHERED,
            [("(probability, expert)", "(positive, expert)"), ("_, expert", "positive = Abs (probability) _, expert")],
            "Abs is no part of a gate",
        ),
    ],
)
def test_refuses(text: str, fault: list[tuple[str, str]], reason: str) -> None:
    assert reason in refusal(mutate(text, *fault), moe_gate.RULE)
