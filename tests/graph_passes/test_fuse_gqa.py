"""Attention: which spellings become a GroupedQueryAttention node, and why the others do not."""

from __future__ import annotations

import re

import numpy as np
import pytest

from graph_passes.fuse import gqa
from tests.graph_passes.texts import ATTENTION, fuse, refusal
from tests.support.graphs import Arrays, assert_same_outputs, mutate, op_types, parse, statements

REPEAT = re.compile(r" +(key|value)_(5|wide|heads) = .*\n")
ONE_GROUP = [
    ("float[B,2,S,6] key", "float[B,1,S,6] key"),
    ("float[B,2,S,6] value", "float[B,1,S,6] value"),
    ("float[B,2,2,S,6] key_wide", "float[B,1,4,S,6] key_wide"),
    ("float[B,2,2,S,6] value_wide", "float[B,1,4,S,6] value_wide"),
    ("(rows, two, two, slots_1, six)", "(rows, axis_1, four, slots_1, six)"),
]


def feeds(groups: int = 2) -> Arrays:
    """Rows in which every query sees a key: what the others get is unspecified."""
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 3, groups, 8, 6), dtype=np.float32)
    return {
        "query": 2 * rng.standard_normal((3, 4, 4, 6), dtype=np.float32),
        "key": key,
        "value": value,
        "start": np.array([0, 5, 19], np.int64),
        "count": np.array([4, 4, 3], np.int64),
    }


def multi_head(text: str) -> str:
    """As many key and value heads as query heads, and so no repeat."""
    text = REPEAT.sub("", text).replace("float[B,2,S,6]", "float[B,4,S,6]")
    text = re.sub(r"\n +<float.*?bool", "\n    <bool", text, flags=re.DOTALL)
    return mutate(text, ("(key_heads)", "(key)"), ("(weights, value_heads)", "(weights, value)"))


@pytest.mark.parametrize(
    ("spelling", "scale"),
    [
        ([], 0.4),
        ([("Mul (product, scale)", "Mul (scale, product)")], 0.4),
        ([("Mul (product, scale)", "Div (product, scale)")], 2.5),
        ([("scores = Mul (product, scale)", "half = Mul (product, scale) scores = Mul (half, scale)")], 0.16),
        ([("Mul (product, scale)", "Identity (product)")], 1.0),
        ([("-3.0e38", "-1.0e30")], 0.4),
        (ONE_GROUP, 0.4),
    ],
    ids=["as traced", "scale on the left", "divided", "scaled twice", "not scaled", "less low", "multi-query"],
)
def test_fuses(spelling: list[tuple[str, str]], scale: float) -> None:
    text = mutate(ATTENTION, *spelling)
    model, (record,) = fuse(text, gqa.RULE)
    assert statements(model)[-1] == "attended = cierzo.GroupedQueryAttention(query, key, value, visible)"
    assert not {"Expand", "Reshape", "Softmax", "Where", "MatMul", "Transpose"} & set(op_types(model))
    assert record.attributes["scale"] == pytest.approx(scale)
    assert record.error is not None
    assert record.error < 2e-6
    assert_same_outputs(parse(text), model, feeds(1 if spelling == ONE_GROUP else 2))


def test_fuses_multi_head_attention_without_a_repeat() -> None:
    text = multi_head(ATTENTION)
    model, _ = fuse(text, gqa.RULE)
    assert statements(model)[-1] == "attended = cierzo.GroupedQueryAttention(query, key, value, visible)"
    assert_same_outputs(parse(text), model, feeds(4))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ([("Softmax <axis = -1>", "Softmax <axis = 2>")], "not a softmax over the last of four axes"),
        (
            [("masked = Where (visible, scores, lowest)", "masked = Add (scores, lowest)")],
            "'masked' should come from Where",
        ),
        ([("-3.0e38", "-1.0e4")], "masked scores are -10000.0, which leaves them some weight"),
        (
            [("int64[B] start", "float low, int64[B] start"), ("(visible, scores, lowest)", "(visible, scores, low)")],
            "masked scores are None, which leaves them some weight",
        ),
        (
            [
                ("Where (visible, scores", "Where (each, scores"),
                (
                    "masked =",
                    """per_head = Concat <axis = 0> (rows, four, tokens_1, slots_1)
                    each = Expand (visible, per_head) masked =""",
                ),
                ("bool[B,1,T,S] visible", "bool[B,1,T,S] visible, bool[B,4,T,S] each"),
            ],
            "the mask is not bool [B, 1, T, S]",
        ),
        (
            [
                ("Where (visible, scores", "Where (square, scores"),
                ("masked =", "square = Squeeze (visible, axis_1) masked ="),
            ],
            "the mask is not bool [B, 1, T, S]",
        ),
        (
            [
                ("<axis = 0> (rows, four, slots_1, six)", "<axis = 0> (rows, four, six, slots_1)"),
                ("[B,4,S,6] key_heads", "[B,4,6,S] key_heads"),
                ("<perm = [0, 1, 3, 2]> (key_heads)", "<perm = [0, 1, 2, 3]> (key_heads)"),
                ("Reshape (value_wide, flat)", "Reshape (value_wide, other)"),
                ("flat =", "other = Concat <axis = 0> (rows, four, slots_1, six) flat ="),
            ],
            "keys are not transposed over their last two axes",
        ),
        ([("float[B,4,T,6] query", "float[B,H,T,6] query")], "axis 1 of 'query' is H, but must be a fixed size"),
        (
            [
                ("int64[B] start", "int64[B] start, float[B,4,6,T] left"),
                ("MatMul (weights, value_heads)", "MatMul (left, weights)"),
                ("float[B,4,T,6] attended", "float[B,4,6,S] attended"),
            ],
            "the attention weights are not the left factor",
        ),
        (
            [("float[B,4,T,6] attended", "float[B,4,T,6] attended, float[B,4,T,S] weights")],
            "'weights' has 1 readers, but must have one",
        ),
        (
            [
                ("float[B,4,T,6] attended", "float[B,4,T,6] attended, float[B,4,T,S] sharp"),
                ("attended = MatMul", "sharp = Sqrt (weights) attended = MatMul"),
            ],
            "'weights' has 2 readers, but must have one",
        ),
        (
            [("MatMul (weights, value_heads)", "Neg (weights)"), ("T,6] attended", "T,S] attended")],
            "should go into MatMul, but goes into Neg",
        ),
        (
            [
                ("float[B,2,S,6] value", "float[B,4,S,6] value"),
                ("MatMul (weights, value_heads)", "MatMul (weights, value)"),
            ],
            "keys have 2 heads and values 4",
        ),
        (
            [("(key_heads)", "(key)"), ("float[B,2,S,6] key", "float[B,1,S,6] key")],
            "'key' has 1 heads where the query has 4",
        ),
        (
            [("Unsqueeze (key, axis_2)", "Unsqueeze (key, axis_1)")],
            "heads are not repeated on an axis of their own behind the head axis",
        ),
        ([("float[B,4,T,6] query", "float[B,1,T,6] query")], "2 heads repeated 2 times do not serve 1 query heads"),
        (
            [("key_wide = Expand (key_5, wide)", "key_wide = Concat <axis = 2> (key_5, key_5)")],
            "'key_wide' should come from Expand",
        ),
        (
            [
                ("float[B,2,S,6] value", "float[B,2,S,8] value"),
                ("[B,2,2,S,6] value_wide", "[B,2,2,S,8] value_wide"),
                ("[B,4,S,6] value_heads", "[B,4,S,8] value_heads"),
                ("T,6] attended", "T,8] attended"),
                ("Expand (value_5, wide)", "Expand (value_5, wide_8)"),
                ("Reshape (value_wide, flat)", "Reshape (value_wide, flat_8)"),
                (
                    "key_5 =",
                    """eight = Constant <value_ints = [8]> ()
                    wide_8 = Concat <axis = 0> (rows, two, two, slots_1, eight)
                    flat_8 = Concat <axis = 0> (rows, four, slots_1, eight)
                    key_5 =""",
                ),
            ],
            "D is 8 in 'value' (value_BGSD) and 6 elsewhere",
        ),
        (
            [
                ("bool[B,1,T,S] visible", "bool[1,1,T,S] visible"),
                ("int64[B] start", "int64[1] start"),
                ("int64[B] count", "int64[1] count"),
            ],
            "B is 1 in 'visible' (visible_B1TS) and B elsewhere",
        ),
    ],
)
def test_refuses(fault: list[tuple[str, str]], reason: str) -> None:
    assert reason in refusal(mutate(ATTENTION, *fault), gqa.RULE)


def test_reshapes_of_another_kind_are_no_repeat() -> None:
    """Slots and head dim change places and change back: same shape, other values."""
    text = mutate(
        ATTENTION,
        ("key_heads = Reshape (key_wide, flat)", "key_heads = Reshape (key_odd, flat)"),
        ("key_5 =", "odd = Concat <axis = 0> (rows, four, six, slots_1) key_5 ="),
        ("value_5 =", "key_odd = Reshape (key_wide, odd) value_5 ="),
    )
    with pytest.raises(AssertionError, match="'key_odd' should come from Expand"):
        fuse(text, gqa.RULE)


def test_a_transpose_without_perm_reverses_the_axes() -> None:
    text = mutate(
        ATTENTION,
        ("Transpose <perm = [0, 1, 3, 2]> (key_heads)", "Transpose (key_heads)"),
        ("float[B,4,S,6] key_heads", "float[S,6,4,B] key_heads"),
        ("Reshape (key_wide, flat)", "Reshape (key_wide, turned)"),
        ("key_5 =", "turned = Concat <axis = 0> (slots_1, six, four, rows) key_5 ="),
    )
    assert "keys are not transposed over their last two axes" in refusal(text, gqa.RULE)


def test_a_scale_per_head_is_no_scale() -> None:
    text = mutate(
        ATTENTION,
        ("Mul (product, scale)", "Mul (product, each)"),
        (
            "scale =",
            "per_head = Constant <value_floats = [0.1, 0.2, 0.3, 0.4]> () spread = Constant <value_ints = [1, 2]> () "
            "each = Unsqueeze (per_head, spread) scale =",
        ),
    )
    assert "'scores' should come from MatMul, but comes from Mul" in refusal(text, gqa.RULE)


def test_infinitely_low_scores_are_masked_too() -> None:
    text = mutate(ATTENTION, ("<value_float = -3.0e38>", "<value_float = -inf>"))
    model, _ = fuse(text, gqa.RULE)
    assert_same_outputs(parse(text), model, feeds())
