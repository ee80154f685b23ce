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
MASK_PER_HEAD = [
    ("Where (visible, scores", "Where (each, scores"),
    (
        "masked =",
        "per_head = Concat <axis = 0> (rows, four, tokens_1, slots_1) each = Expand (visible, per_head) masked =",
    ),
    ("bool[B,1,T,S] visible", "bool[B,1,T,S] visible, bool[B,4,T,S] each"),
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
        ([("key_wide = Expand (key_5, wide)", "key_wide = Concat <axis = 2> (key_5, key_5)")], 0.4),
        (MASK_PER_HEAD, 0.4),
        (
            [
                ("Where (visible, scores, lowest)", "Where (hidden, lowest, scores)"),
                ("masked =", "hidden = Not (visible) masked ="),
            ],
            0.4,
        ),
        (
            [
                ("Mul (product, scale)", "Neg (negative)"),
                ("scores =", "minus = Neg (scale) negative = Mul (product, minus) scores ="),
            ],
            0.4,
        ),
    ],
    ids=[
        "as traced",
        "scale on the left",
        "divided",
        "scaled twice",
        "not scaled",
        "less low",
        "multi-query",
        "joined copies",
        "mask for each head",
        "hidden and not visible",
        "negative twice",
    ],
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
        ([("Softmax <axis = -1>", "Softmax <axis = 2>")], "not a softmax over the last axis of scores [..., T, S]"),
        (
            [
                ("masked = Where (visible, scores, lowest)", "masked = Add (scores, given)"),
                ("int64[B] start", "float[B,1,T,S] given, int64[B] start"),
            ],
            "comes from outside as float values ('given'), which cannot be known",
        ),
        (
            [
                ("masked = Where (visible, scores, lowest)", "masked = Add (scores, deep)"),
                ("int64[B] start", "float[B,1,T,S] given, int64[B] start"),
                (
                    "lowest =",
                    "nothing = Constant <value_float = 0.0> () deep = Where (visible, nothing, given) lowest =",
                ),
            ],
            "comes from outside as float values ('given'), which cannot be known",
        ),
        (
            [
                ("Where (visible, scores, lowest)", "Where (visible, scores, some)"),
                ("lowest =", "some = Neg (scores) lowest ="),
            ],
            "neither choice of the mask is a constant number",
        ),
        ([("-3.0e38", "-1.0e4")], "masked scores are -10000, which leaves them some weight"),
        (
            [("int64[B] start", "float low, int64[B] start"), ("(visible, scores, lowest)", "(visible, scores, low)")],
            "neither choice of the mask is a constant number",
        ),
        (
            [
                ("int64[B] start", "bool[B,4,T,S] each, int64[B] start"),
                ("Where (visible, scores", "Where (each, scores"),
            ],
            "the mask 'each' is [B, 4, T, S], but must be [B, 1, T, S]",
        ),
        (
            [("int64[B] start", "bool[T,S] each, int64[B] start"), ("Where (visible, scores", "Where (each, scores")],
            "the mask 'each' is [T, S], but must be [B, 1, T, S]: of its own for each row",
        ),
        (
            [
                ("Where (visible, scores", "Where (square, scores"),
                ("masked =", "square = Squeeze (visible, axis_1) masked ="),
            ],
            "computes something else",  # rows of the mask are taken for heads
        ),
        (
            [("float[B,4,T,6] query", "float[B,H,T,6] query")],
            "the result 'attended' [B, 4, T, 6] has not the shape [B, H, T, D] of the queries",
        ),
        (
            [
                ("int64[B] start", "int64[B] start, float[B,4,6,T] left"),
                ("MatMul (weights, value_heads)", "MatMul (left, weights)"),
                ("float[B,4,T,6] attended", "float[B,4,6,S] attended"),
            ],
            "the shapes do not fit together: the result is 'attended' [B, 4, 6, S]",
        ),
        (
            [("float[B,4,T,6] attended", "float[B,4,T,6] attended, float[B,4,T,S] weights")],
            "the weights 'weights' have 1 readers and the graph returns it, but must have one",
        ),
        (
            [
                ("float[B,4,T,6] attended", "float[B,4,T,6] attended, float[B,4,T,S] sharp"),
                ("attended = MatMul", "sharp = Sqrt (weights) attended = MatMul"),
            ],
            "the weights 'weights' have 2 readers, but must have one",
        ),
        (
            [("MatMul (weights, value_heads)", "Neg (weights)"), ("T,6] attended", "T,S] attended")],
            "the weights should go into a product with the values, but go into Neg",
        ),
        (
            [("(key_heads)", "(key)"), ("float[B,2,S,6] key", "float[B,1,S,6] key")],
            "the values 'value' [B, 2, S, 6] have not the shape [B, G, S, D] of the keys",
        ),
        (
            [("Unsqueeze (key, axis_2)", "Unsqueeze (key, axis_1)")],
            "the heads of 'key' are tiled (0 1 0 1)",
        ),
        (
            [("float[B,4,T,6] query", "float[B,1,T,6] query")],
            "the result 'attended' [B, 4, T, 6] has not the shape [B, H, T, D] of the queries",
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
            "the result 'attended' [B, 4, T, 8] has not the shape [B, H, T, D] of the queries",
        ),
        (
            [
                ("bool[B,1,T,S] visible", "bool[1,1,T,S] visible"),
                ("int64[B] start", "int64[1] start"),
                ("int64[B] count", "int64[1] count"),
            ],
            "the mask 'visible' is [1, 1, T, S], but must be [B, 1, T, S]: of its own for each row",
        ),
    ],
)
def test_refuses(fault: list[tuple[str, str]], reason: str) -> None:
    assert reason in refusal(mutate(ATTENTION, *fault), gqa.RULE)


REGROUPED = [
    (
        "key_heads = Reshape (key_wide, flat)",
        "odd = Concat <axis = 0> (rows, four, six, slots_1) key_odd = Reshape (key_wide, odd) "
        "key_heads = Reshape (key_odd, flat)",
    ),
]
OWN_VALUES = [
    (
        "    value_5 = Unsqueeze (value, axis_2)\n    value_wide = Expand (value_5, wide)\n"
        "    value_heads = Reshape (value_wide, flat)\n",
        "",
    ),
    ("float[B,2,S,6] value", "float[B,4,S,6] value"),
    ("MatMul (weights, value_heads)", "MatMul (weights, value)"),
]
MIXED_UP = [
    ("Transpose <perm = [0, 1, 3, 2]> (key_heads)", "Transpose (key_heads)"),
    ("float[B,4,S,6] key_heads", "float[S,6,4,B] key_heads"),
    ("Reshape (key_wide, flat)", "Reshape (key_wide, turned)"),
    ("key_5 =", "turned = Concat <axis = 0> (slots_1, six, four, rows) key_5 ="),
]


@pytest.mark.parametrize(
    ("spelling", "inputs"),
    [
        (REGROUPED, "query, key, value, visible"),
        (OWN_VALUES, "query, key_heads, value, visible"),
        (MIXED_UP, "query, attended__GroupedQueryAttention__input_1_0_out, value_heads, visible"),
    ],
    ids=["two reshapes that undo each other", "as many value as query heads", "keys that are no repeat"],
)
def test_what_is_no_repeat_stays_outside(spelling: list[tuple[str, str]], inputs: str) -> None:
    """The node then takes what the repeat would have given it: more than is needed, and right."""
    text = mutate(ATTENTION, *spelling)
    model, _ = fuse(text, gqa.RULE)
    found = statements(model)[-1].partition("Attention(")[2].rstrip(")")
    assert found.split(", ")[0::2] == inputs.split(", ")[0::2]
    arrays = feeds()
    if spelling is OWN_VALUES:
        arrays["value"] = feeds(4)["value"]
    assert_same_outputs(parse(text), model, arrays)


def test_a_ring_that_is_cut_short_is_not_read_whole() -> None:
    """The first 512 slots are all there are of a short ring, and so of every example."""
    text = mutate(
        ATTENTION,
        ("[B,2,2,S,6] key_wide, float[B,4,S,6] key_heads", "[B,2,2,C,6] key_wide, float[B,4,C,6] key_heads"),
        ("[B,2,2,S,6] value_wide, float[B,4,S,6] value_heads", "[B,2,2,C,6] value_wide, float[B,4,C,6] value_heads"),
        (
            "wide = Concat <axis = 0> (rows, two, two, slots_1, six)",
            "wide = Constant <value_ints = [1, 1, 2, 1, 1]> ()",
        ),
        ("(rows, four, slots_1, six)", "(rows, four, open, six)"),
        (
            "flat =",
            """open = Constant <value_ints = [-1]> () most = Constant <value_ints = [512]> ()
            from = Constant <value_ints = [0]> () slot_axis = Constant <value_ints = [3]> ()
            short_key = Slice (key, from, most, axis_2) short_value = Slice (value, from, most, axis_2)
            short = Slice (visible, from, most, slot_axis) flat =""",
        ),
        ("Unsqueeze (key, axis_2)", "Unsqueeze (short_key, axis_2)"),
        ("Unsqueeze (value, axis_2)", "Unsqueeze (short_value, axis_2)"),
        ("Where (visible,", "Where (short,"),
    )
    assert "the mask 'short' is [B, 1, T, " in refusal(text, gqa.RULE)


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
    assert "the scores are multiplied by more than one number, which is no scale" in refusal(text, gqa.RULE)


def test_infinitely_low_scores_are_masked_too() -> None:
    text = mutate(ATTENTION, ("<value_float = -3.0e38>", "<value_float = -inf>"))
    model, _ = fuse(text, gqa.RULE)
    assert_same_outputs(parse(text), model, feeds())
