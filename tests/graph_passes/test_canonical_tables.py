"""Canonical form of angle tables and target shapes: exact rewrites, and look-alikes that must stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.support.graphs import Arrays, canonical, mutate, parse, run, statements

WIDE = """g (float[B,T,3] angle) => (float[B,1,T,6] y) {
    axis_1 = Constant <value_ints = [1]> ()
    wide = Concat <axis = 2> (angle, angle)
    cosine = Cos (wide)
    scale = Constant <value_float = 1.5> ()
    scaled = Mul (cosine, scale)
    y = Unsqueeze (scaled, axis_1)
}"""

LOOKED_UP = """g (int64[B,T] position) => (float[B,T,4] y)
    <float[5,4] table = {0.5, 1.5, 0.5, 1.5, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9}>
{
    row = Gather (table, position)
    y = Neg (row)
}"""

EXPANDED = """g (float[B,2,S,6] key) => (float[B,4,S,6] y) <float[B,2,1,S,6] column, float[B,2,2,S,6] wide> {
    axis_2 = Constant <value_ints = [2]> ()
    rows = Shape <start = 0, end = 1> (key)
    slots = Shape <start = 2, end = 3> (key)
    two = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    six = Constant <value_ints = [6]> ()
    target = Concat <axis = 0> (rows, two, two, slots, six)
    flat = Concat <axis = 0> (rows, four, slots, six)
    column = Unsqueeze (key, axis_2)
    wide = Expand (column, target)
    y = Reshape (wide, flat)
}"""


def same(text: str, feeds: Arrays) -> ir.Model:
    """The canonical graph, after holding it to the text's own numbers: but for the last bit of a cosine the same."""
    model = canonical(text)
    want, got = run(parse(text), feeds), run(model, feeds)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2.5e-7, atol=0)
    return model


def angle() -> Arrays:
    return {"angle": np.random.default_rng(0).standard_normal((2, 5, 3), dtype=np.float32)}


def positions() -> Arrays:
    return {"position": np.array([[0, 4, 2], [1, 1, 3]], np.int64)}


def widths(model: ir.Model, op_type: str) -> list[int | str]:
    """The last extent of what each node of `op_type` makes."""
    found = [node.outputs[0].shape for node in model.graph if node.op_type == op_type]
    return [shape[-1] if isinstance(shape[-1], int) else str(shape[-1]) for shape in found if shape is not None]


@pytest.mark.parametrize("function", ["Cos", "Sin"])
def test_a_function_of_a_table_joined_with_itself_is_worked_out_once(function: str) -> None:
    model = same(mutate(WIDE, ("Cos (wide)", f"{function} (wide)")), angle())
    assert widths(model, function) == [3]
    assert widths(model, "Mul") == [3]
    assert widths(model, "Concat") == [6]


def test_functions_also_come_before_the_axes_are_moved() -> None:
    text = mutate(
        WIDE,
        ("cosine = Cos (wide)", "tall = Unsqueeze (wide, axis_1) cosine = Cos (tall)"),
        ("y = Unsqueeze (scaled, axis_1)", "y = Identity (scaled)"),
    )
    model = same(text, angle())
    assert [line.split(" = ")[1].split("(")[0] for line in statements(model)] == ["Cos", "Mul", "Concat", "Unsqueeze"]


@pytest.mark.parametrize(
    "change",
    [
        [
            (
                "wide = Concat <axis = 2> (angle, angle)",
                "twice = Add (angle, angle) wide = Concat <axis = 2> (angle, twice)",
            )
        ],
        [("Constant <value_float = 1.5>", "Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]>")],
        [("scaled = Mul (cosine, scale)", "scaled = Mul (cosine, wide)")],
        [("cosine = Cos (wide)", "cosine = Softmax <axis = -1> (wide)")],
        [("cosine = Cos (wide)", "last = Constant <value_int = 2> () cosine = CumSum (wide, last)")],
    ],
    ids=["two tables", "a factor for each element", "times another table", "no function of single elements", "a sum"],
)
def test_what_is_no_function_of_single_elements_stays(change: list[tuple[str, str]]) -> None:
    model = same(mutate(WIDE, *change), angle())
    assert widths(model, "Mul") == [6]


def test_a_kept_table_with_equal_halves_is_halved() -> None:
    model = same(LOOKED_UP, positions())
    assert widths(model, "Gather") == [2]
    assert widths(model, "Concat") == [4]


def test_a_kept_table_with_equal_neighbours_is_halved() -> None:
    halves = "0.5, 1.5, 0.5, 1.5, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9"
    neighbours = "0.5, 0.5, 1.5, 1.5, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9"
    text = mutate(LOOKED_UP, (halves, neighbours))
    assert widths(same(text, positions()), "Gather") == [2]


@pytest.mark.parametrize(
    "change",
    [
        ("8, 9, 8, 9", "8, 9, 8, 10"),
        ("Gather (table, position)", "Gather <axis = 1> (table, position)"),
        ("[5,4]", "[4,5]"),
    ],
    ids=["one element differs", "another axis", "an odd width"],
)
def test_a_kept_table_that_is_not_twice_the_same_stays(change: tuple[str, str]) -> None:
    text = mutate(LOOKED_UP, change)
    if "axis = 1" in change[1]:
        text = text.replace("float[B,T,4] y", "float[5,B,T] y")
    if change[1] == "[4,5]":
        text = text.replace("float[B,T,4] y", "float[B,T,5] y")
    feeds: Arrays = {"position": np.array([[0, 3, 2], [1, 1, 3]], np.int64)}
    model = same(text, feeds)
    assert [line.split(" = ")[1].split("(")[0] for line in statements(model)] == ["Gather", "Neg"]


def test_target_shapes_are_stated() -> None:
    model = same(EXPANDED, {"key": np.random.default_rng(0).standard_normal((3, 2, 5, 6), dtype=np.float32)})
    assert statements(model) == [
        "column = Unsqueeze(key, [2])",
        "wide = Expand(column, [1, 1, 2, 1, 1])",
        "y = Reshape(wide, [0, 4, -1, 6])",
    ]


def test_a_target_that_needs_another_value_stays() -> None:
    """R is the extent of `extra` alone: a constant could not say it."""
    text = mutate(
        EXPANDED,
        ("float[B,2,S,6] key)", "float[B,2,S,6] key, float[R] extra)"),
        ("float[B,4,S,6] y", "float[B,U,S,6] y"),
        ("float[B,2,2,S,6] wide", "float[B,2,R,S,6] wide"),
        ("(rows, two, two, slots, six)", "(rows, two, more, slots, six)"),
        ("(rows, four, slots, six)", "(rows, all, slots, six)"),
        ("axis_2 =", "more = Shape (extra)\n all = Constant <value_ints = [-1]> ()\n axis_2 ="),
    )
    key = np.random.default_rng(0).standard_normal((3, 2, 5, 6), dtype=np.float32)
    model = same(text, {"key": key, "extra": np.zeros(3, np.float32)})
    assert any("Expand(column, target)" in line for line in statements(model))
