"""Experts: which sums over experts become a MixtureOfExperts node, and why the others do not."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.fuse import moe
from tests.graph_passes.texts import EXPERTS, fuse, refusal
from tests.support.graphs import Arrays, assert_same_outputs, mutate, parse, statements

Spelling = list[tuple[str, str]]
ACTIVE = "sigmoid = Sigmoid (gate_x)\n    active = Mul (gate_x, sigmoid)"
FUSED = ["y = cierzo.MixtureOfExperts(x, weight, expert, gate, up, down)"]


def feeds() -> Arrays:
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((2, 4, 10, 12), dtype=np.float32)
    return {
        "x": rng.standard_normal((7, 12), dtype=np.float32),
        "weight": rng.random((7, 2), dtype=np.float32),
        "expert": np.stack([rng.permutation(4)[:2] for _ in range(7)]).astype(np.int64),
        "gate": gate,
        "up": up,
        "down": rng.standard_normal((4, 12, 10), dtype=np.float32),
    }


def constants(**values: float) -> str:
    """Statements that make float scalars."""
    return " ".join(f"{name} = Constant <value_float = {value}> ()" for name, value in values.items())


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        (ACTIVE, "silu"),
        ("active = Swish (gate_x)", "silu"),
        (
            f"{constants(o=1.0)} n = Neg (gate_x) e = Exp (n) d = Add (e, o) active = Div (gate_x, d)",
            "silu",
        ),
        ("active = Gelu (gate_x)", "gelu"),
        (
            f"{constants(r=0.70710678, h=0.5, o=1.0)} s = Mul (gate_x, r) e = Erf (s) p = Add (e, o) "
            "a = Mul (gate_x, h) active = Mul (a, p)",
            "gelu",
        ),
        ('active = Gelu <approximate = "tanh"> (gate_x)', "gelu_tanh"),
        (f"{constants(c=1.702)} s = Mul (c, gate_x) g = Sigmoid (s) active = Mul (g, gate_x)", "quick_gelu"),
        ("active = Relu (gate_x)", "relu"),
        ("r = Relu (gate_x) active = Mul (r, r)", "relu2"),
        ("active = Sigmoid (gate_x)", "sigmoid"),
        ("active = Tanh (gate_x)", "tanh"),
    ],
)
def test_names_the_activation_by_its_values(statement: str, name: str) -> None:
    text = mutate(EXPERTS, (ACTIVE, statement))
    model, (record,) = fuse(text, moe.RULE)
    assert statements(model) == FUSED
    assert record.attributes == {"activation": name}
    assert record.error is not None
    assert record.error < 2e-6
    assert_same_outputs(parse(text), model, feeds())


@pytest.mark.parametrize(
    "spelling",
    [
        [("ScatterElements <axis = 1>", 'ScatterElements <axis = 1, reduction = "add">')],
        [("Mul (active, up_x)", "Mul (up_x, active)")],
        [("Mul (out, weight_EN1)", "Mul (weight_EN1, out)")],
        [("nothing = Expand (zero, shape)", "nothing = ConstantOfShape (shape)")],
        [("nothing = Expand (zero, shape)", "nothing = ConstantOfShape <value = float[1] {0}> (shape)")],
        [
            (
                "nothing = Expand (zero, shape)",
                "column = Constant <value_floats = [0.0, 0.0, 0.0, 0.0]> () nothing = Expand (column, shape)",
            )
        ],
    ],
)
def test_fuses_other_spellings(spelling: Spelling) -> None:
    text = mutate(EXPERTS, *spelling)
    model, _ = fuse(text, moe.RULE)
    assert statements(model) == FUSED
    assert_same_outputs(parse(text), model, feeds())


FIXED = """g (float[5,12] x, float[5,2] weight, int64[5,2] expert, float[4,10,12] gate, float[4,10,12] up,
    float[4,12,10] down) => (float[5,12] y)
{
    ground = Constant <value = float[5,4] {0,0,0,0, 0,0,0,0, 0,0,0,0, 0,0,0,0, 0,0,0,1}> ()
    nothing = Identity (ground)""" + EXPERTS[EXPERTS.index("{") + 1 :].replace("nothing = Expand (zero, shape)", "")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            [("<value_ints = [0]>", "<value_ints = [2]>"), ("float[N,12] y", "float[4,N] y")],
            "no value [N, C] was found that is made of stacks of expert matrices",
        ),
        (
            [("<keepdims = 0>", "<keepdims = 1>"), ("float[N,12] y", "float[1,N,12] y")],
            "no value [N, C] was found that is made of stacks of expert matrices",
        ),
        (
            [("weighted = Mul", "weighted = Add")],
            "it looks like MixtureOfExperts with {'activation': 'silu'} but computes something else",
        ),
        (
            [
                (
                    "float[N,12] x, float[N,2] weight, int64[N,2] expert",
                    "float[4,12] x, float[4,2] weight, int64[4,2] expert",
                ),
                ("weight_EN = Transpose <perm = [1, 0]>", "weight_EN = Transpose <perm = [0, 1]>"),
                ("=> (float[N", "=> (float[4"),
                ("<float[N,4]", "<float[4,4]"),
            ],
            "it looks like MixtureOfExperts with {'activation': 'silu'} but computes something else",
        ),
        (
            [("ScatterElements <axis = 1>", 'ScatterElements <axis = 1, reduction = "max">')],
            "the scatter reduces (max) instead of replacing",
        ),
        (
            [("<value_float = 0.0>", "<value_float = 0.5>")],
            "experts that were not chosen have a weight other than zero",
        ),
        (
            [("nothing = Expand (zero, shape)", "nothing = ConstantOfShape <value = float[1] {1}> (shape)")],
            "experts that were not chosen have a weight other than zero",
        ),
        (
            [
                ("int64[N,2] expert", "int64[N,2] expert, float ground"),
                ("Expand (zero, shape)", "Expand (ground, shape)"),
            ],
            "experts that were not chosen have a weight other than zero",
        ),
        (
            [("int64[N,2] expert", "int64[N,2] expert, float[N,4] ground"), ("(nothing, expert", "(ground, expert")],
            "experts that were not chosen have a weight other than zero",
        ),
        (
            [
                ("float[4,10,12] gate", "float[10,4,12] gate"),
                ("gate_t = Transpose <perm = [0, 2, 1]>", "gate_t = Transpose <perm = [1, 2, 0]>"),
            ],
            "the matrices should be [E, I, C], [E, I, C] and [E, C, I], but are ",
        ),
        (
            [("int64[N,2] expert", "int64[N,2] expert, float[N,12] z"), ("gate_x = MatMul (x,", "gate_x = MatMul (z,")],
            "the experts read 'x' and 'z', but must all read the same tokens",
        ),
        (
            [
                ("int64[N,2] expert", "int64[N,2] expert, float[4,N,12] z"),
                ("gate_x = MatMul (x,", "gate_x = MatMul (z,"),
                ("up_x = MatMul (x,", "up_x = MatMul (z,"),
            ],
            "the experts also read 'z' [4, 'N', 12], which is neither tokens nor routing",
        ),
        ([("Mul (active, up_x)", "Mul (gate_x, up_x)")], "no activation lies between the experts' matrices"),
        ([("Mul (active, up_x)", "Mul (active, active)")], "the activation is none that is known; the nearest, relu2"),
        (
            [
                ("int64[N,2] expert", "int64[N,2] expert, float[4,N,10] z"),
                (ACTIVE, "s = Sigmoid (z) active = Mul (z, s)"),
            ],
            "the experts also read 'active' [4, 'N', 10], which is neither tokens nor routing",
        ),
        (
            [
                ("int64[N,2] expert", "int64[N,2] expert, float[4,N,10] z"),
                (ACTIVE, "s = Sigmoid (z) active = Mul (s, gate_x)"),
            ],
            "the experts also read 's' [4, 'N', 10], which is neither tokens nor routing",
        ),
        ([(ACTIVE, "active = Elu (gate_x)")], "the activation is none that is known; the nearest, "),
        ([(ACTIVE, "active = Softmax (gate_x)")], "it is no function of single elements, and so no activation"),
        (
            [(ACTIVE, f"{constants(c=1.6)} s = Mul (c, gate_x) g = Sigmoid (s) active = Mul (g, gate_x)")],
            "the nearest, quick_gelu",
        ),
        ([(ACTIVE, "active = Sqrt (gate_x)")], "the activation is none that is known"),
        (
            [
                (
                    ACTIVE,
                    """r = Relu (gate_x) highest = ReduceMax <keepdims = 1> (r, axis_0)
                    active = Expand (highest, shape_x)""",
                ),
                ("gate_x =", "shape_x = Shape (weight_EN1) gate_x ="),
            ],
            "ReduceMax has no place among the experts",
        ),
        (
            [(ACTIVE, "r = Relu (gate_x) active = ReduceMax <keepdims = 1> (r, axis_0)")],
            "ReduceMax has no place among the experts",
        ),
        (
            [
                (
                    ACTIVE,
                    "bias = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]> () "
                    "b = Add (gate_x, bias) active = Relu (b)",
                )
            ],
            "the activation is not the same function of every element",
        ),
    ],
)
def test_refuses(fault: Spelling, reason: str) -> None:
    assert reason in refusal(mutate(EXPERTS, *fault), moe.RULE)


def test_a_constant_ground_must_be_zero() -> None:
    assert "experts that were not chosen have a weight other than zero" in refusal(FIXED, moe.RULE)


def test_a_fixed_number_of_tokens_cannot_be_proved() -> None:
    """The proof runs other numbers of tokens than the graph's, which a constant of its size does not let pass."""
    reason = refusal(mutate(FIXED, ("0,0,0,1}", "0,0,0,0}")), moe.RULE)
    assert "it looks like MixtureOfExperts with {'activation': 'silu'} but computes something else" in reason


def test_a_scatter_of_something_else_is_no_beginning() -> None:
    text = mutate(
        EXPERTS, ("(nothing, expert, weight)", "(nothing, other, weight)"), ("scattered =", f"{LATER} scattered =")
    )
    assert "the expert numbers come from Add; which is no MoEGate" in refusal(text, moe.RULE)


LATER = "one_int = Constant <value_ints = [1]> () other = Add (expert, one_int)"
