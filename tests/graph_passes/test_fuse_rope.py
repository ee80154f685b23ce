"""RoPE: which spellings become a RotaryEmbedding node, and why the others do not."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.fuse import rope
from tests.graph_passes.texts import ROPE, fuse, refusal
from tests.support.graphs import Arrays, assert_same_outputs, mutate, op_types, parse, statements

NO_ROTATION = "it is a bilinear form of x and two tables, but not the rotation by their angles"
RNG = np.random.default_rng(0)


def feeds(head_dim: int = 6) -> Arrays:
    cos, sin = RNG.standard_normal((2, 3, 5, head_dim // 2), dtype=np.float32)
    return {"x": RNG.standard_normal((3, 4, 5, head_dim), dtype=np.float32), "cos": cos, "sin": sin}


@pytest.mark.parametrize(
    "spelling",
    [
        [],
        [("[9223372036854775807]", "[6]")],
        [("axis = Constant <value_ints = [3]>", "axis = Constant <value_ints = [-1]>")],
        [("Slice (x, zero, half, axis, one)", "Slice (x, zero, half, axis)")],
        [("Mul (low, cos_head)", "Mul (cos_head, low)"), ("Mul (high, sin_head)", "Mul (sin_head, high)")],
        [("Add (high_cos, low_sin)", "Add (low_sin, high_cos)")],
        [("<axis = -1>", "<axis = 3>")],
    ],
    ids=["as traced", "end", "last axis", "no step", "angles on the left", "terms turned", "positive axis"],
)
def test_fuses(spelling: list[tuple[str, str]]) -> None:
    text = mutate(ROPE, *spelling)
    model, (record,) = fuse(text, rope.RULE)
    assert statements(model) == ["y = cierzo.RotaryEmbedding(x, cos, sin)"]
    assert model.graph[0].attributes["interleaved"].as_int() == 0
    assert (record.rule, record.op, record.attributes) == ("rope", "RotaryEmbedding", {"interleaved": 0})
    assert record.error is not None
    assert 0 <= record.error < 1e-6
    assert_same_outputs(parse(text), model, feeds())


def test_a_table_with_an_axis_of_one_is_squeezed() -> None:
    text = mutate(
        ROPE,
        ("sin_head = Unsqueeze (sin, one)", "sin_head = Transpose <perm = [0, 2, 1, 3]> (sin)"),
        ("float[B,T,3] sin", "float[B,T,1,3] sin"),
    )
    model, _ = fuse(text, rope.RULE)
    assert op_types(model) == ["Constant", "Squeeze", "RotaryEmbedding"]
    given = feeds()
    assert_same_outputs(parse(text), model, {**given, "sin": given["sin"][:, :, None]})


def test_halves_that_others_read_stay_for_them() -> None:
    text = mutate(
        ROPE, ("(float[B,4,T,6] y)", "(float[B,4,T,6] y, float[B,4,T,3] z)"), ("y = Concat", "z = Neg (low) y = Concat")
    )
    model, _ = fuse(text, rope.RULE)
    assert {"z = Neg(low)", "y = cierzo.RotaryEmbedding(x, cos, sin)"} < set(statements(model))
    assert_same_outputs(parse(text), model, feeds())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ([("(first, second)", "(first, second, low)"), ("[B,4,T,6] y", "[B,4,T,9] y")], "the head dim 9 is odd"),
        ([("<axis = -1>", "<axis = 2>"), ("[B,4,T,6] y", "[B,4,U,3] y")], "the head dim 3 is odd"),
        ([("first = Sub", "first = Add")], NO_ROTATION),
        ([("second = Add", "second = Sub")], NO_ROTATION),
        ([("Mul (sin_head, low)", "Mul (cos_head, low)")], NO_ROTATION),
        ([("Mul (high, cos_head)", "Mul (low, cos_head)")], NO_ROTATION),
        (
            [("] x,", "] x, float[B,4,T,6] z,"), ("high = Slice (x", "high = Slice (z")],
            "'low_cos' is joined or added to it, but is not made of the same x",
        ),
        (
            [("float[B,4,T,6] x", "float[B,4,T,7] x"), ("[9223372036854775807]", "[6]")],
            "no value of the result's shape is turned into it",
        ),
        (
            [("float[B,4,T,6] x", "float[B,4,T,D] x"), ("[9223372036854775807]", "[6]")],
            "what Slice takes for 'low' depends on sizes or bounds left open",
        ),
        (
            [
                ("(x, zero, half", "(x, half, end"),
                ("(x, half, end, axis, one)\n    cos", "(x, zero, half, axis, one)\n    cos"),
            ],
            NO_ROTATION,
        ),
        (
            [("float[B,4,T,6] x", "float[B,4,T,8] x"), ("[9223372036854775807]", "[6]")],
            "no value of the result's shape is turned into it",
        ),
        (
            [("] x,", "] x, float[B,4,T,3] z,"), ("low = Slice (x, zero, half, axis, one)", "low = Neg (z)")],
            "'low_cos' is joined or added to it, but is not made of the same x",
        ),
        ([("zero, half, axis, one", "zero, half, axis, axis")], NO_ROTATION),
        (
            [("] x,", "] x, int64[1] mid,"), ("(x, zero, half", "(x, zero, mid")],
            "what Slice takes for 'low' depends on sizes or bounds left open",
        ),
        (
            [("sin_head = Unsqueeze (sin, one)", "sin_head = Unsqueeze (sin, zero)")],
            "x and its tables do not lie along the same rows and tokens",
        ),
        (
            [("float[B,T,3] cos", "float[B,T,1] cos")],
            "the angles 'cos' are [B, T, 1] where [B, T, 3] is needed",
        ),
        ([("float[B,T,3] cos", "float[1,T,3] cos")], "B is 1 in 'cos' (cos_BTd) and B elsewhere"),
        ([("float[B,T,3] sin", "float[B,1,3] sin")], "T is 1 in 'sin' (sin_BTd) and T elsewhere"),
    ],
)
def test_refuses(fault: list[tuple[str, str]], reason: str) -> None:
    assert reason in refusal(mutate(ROPE, *fault), rope.RULE)
