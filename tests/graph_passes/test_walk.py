"""The walks that matchers share: what they pass, where they end, and how they name the end."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from graph_passes.fuse.walk import REARRANGEMENTS, back, cone, forward, only_reader, unexpected, uniform
from tests.support.graphs import parse

CHAIN = """g (float[B,2,S,6] x, int64[B] index) => (float[B,4,6,S] y, float[B,2,S,6] z)
    <float[B,2,2,S,6] wide, float[B,4,S,6] heads, float[B,4,6,S] turned>
{
    two = Constant <value_float = 2.0> ()
    four = Constant <value_float = 4.0> ()
    axis = Constant <value_ints = [2]> ()
    rows = Constant <value_ints = [1, 1, 2, 1, 1]> ()
    flat = Constant <value_ints = [0, 4, -1, 6]> ()
    root = Tanh (x)
    scaled = Mul (two, root)
    z = Neg (x)
    apart = Unsqueeze (scaled, axis)
    wide = Concat <axis = 2> (apart, apart)
    heads = Reshape (wide, flat)
    turned = Transpose <perm = [0, 1, 3, 2]> (heads)
    y = Div (turned, four)
}"""


def lifted(text: str) -> ir.Model:
    """The graph with its constants known, and otherwise as written."""
    model = parse(text)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def value(model: ir.Model, name: str) -> ir.Value:
    """The value of that name."""
    found = {v.name: v for node in model.graph for v in node.outputs} | {v.name: v for v in model.graph.inputs}
    return found[name]


def test_back_passes_rearrangements_and_constant_factors() -> None:
    steps = back(value(lifted(CHAIN), "y"))
    assert [(step.value.name, step.factor) for step in steps] == [
        ("y", 1.0),
        ("turned", 0.25),
        ("heads", 0.25),
        ("wide", 0.25),
        ("apart", 0.25),
        ("scaled", 0.25),
        ("root", 0.5),
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "y = Concat <axis = 1> (x, z)",
        "y = GatherElements <axis = 3> (x, places)",
        "y = Mul (x, z)",
        "y = Mul (x, four)",
        "y = Div (two, x)",
        "y = Div (x, zero)",
        "y = Add (x, two)",
        "y = Cast <to = 1> (count)",
    ],
)
def test_back_ends_at_what_mixes_values_or_is_no_number(statement: str) -> None:
    text = f"""g (float[B,2,T,6] x, float[B,2,T,6] z, int64[B,2,T,6] places, int64[B] count) => (float[B,_,T,6] y) {{
        two = Constant <value_float = 2.0> ()
        zero = Constant <value_float = 0.0> ()
        four = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]> ()
        {statement}
    }}"""
    assert [step.value.name for step in back(value(lifted(text.replace("[B,_,T,6]", "[N,M,T,6]")), "y"))] == ["y"]


def test_forward_goes_on_while_there_is_one_reader() -> None:
    model = lifted(CHAIN)
    assert [v.name for v in forward(value(model, "wide"))] == ["wide", "heads", "turned"]
    assert [v.name for v in forward(value(model, "scaled"))] == ["scaled", "apart", "wide", "heads", "turned"]
    assert [v.name for v in forward(value(model, "x"))] == ["x"]
    assert only_reader(value(model, "x")) is None
    assert only_reader(value(model, "y")) is None


def test_a_cone_holds_what_lies_behind_a_value_and_its_ends() -> None:
    model = lifted(CHAIN)
    found = cone(value(model, "y"), REARRANGEMENTS | {"Mul", "Div"})
    assert [v.name for v in found.values] == ["y", "turned", "heads", "wide", "apart", "scaled", "root"]
    assert [v.name for v in found.ends] == ["root"]
    short = cone(value(model, "y"), REARRANGEMENTS | {"Mul", "Div"}, stop=lambda v: v.name == "wide")
    assert [v.name for v in short.ends] == ["wide"]


def test_an_end_is_named_with_what_it_comes_from() -> None:
    model = lifted(CHAIN)
    assert unexpected(value(model, "root"), "MatMul").reason == "'root' should come from MatMul, but comes from Tanh"
    assert unexpected(value(model, "x"), "MatMul").reason == "'x' should come from MatMul, but is an input"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("y = Slice (x, from, to, last)", True),
        ("y = Slice (x, from, to, slots)", False),
        ("y = Slice (table, from, size, from)", False),
        ("y, z = Split <axis = 3, num_outputs = 2> (x)", True),
        ("y, z = Split <axis = 2, num_outputs = 2> (x)", False),
        ("y = Gather <axis = 1> (x, to)", True),
        ("y = Gather <axis = 2> (x, to)", False),
        ("y = GatherElements <axis = 3> (x, places)", False),
        ("y = GatherND <batch_dims = 1> (x, to)", True),
        ("y = GatherND <batch_dims = 2> (x, to)", False),
        ("y = Cast <to = 10> (x)", False),
        ("y = Cast <to = 11> (x)", True),
        ("y = Transpose <perm = [0, 2, 1, 3]> (x)", True),
        ("y = Tanh (x)", True),
    ],
)
def test_only_what_is_the_same_at_every_size_is_uniform(statement: str, expected: bool) -> None:
    """[:1] of two fixed heads is, [:1] of however many slots is not; nor is rounding to half precision."""
    text = f"""g (float[B,2,S,6] x) => (y) {{
        from = Constant <value_ints = [0]> () to = Constant <value_ints = [1]> ()
        slots = Constant <value_ints = [2]> () last = Constant <value_ints = [3]> ()
        table = Constant <value_floats = [1.0, 2.0, 3.0]> () size = Shape <start = 2, end = 3> (x)
        places = Constant <value = int64[1,1,1,2] {{1, 0}}> ()
        {statement}
    }}"""
    model = lifted(text)
    common.ShapeInferencePass()(model)
    node = value(model, "y").producer()
    assert node is not None
    assert uniform(node) is expected


def test_a_shape_that_is_unknown_is_not_the_same_at_every_size() -> None:
    model = lifted("g (float[B,2,S,6] x, int64[1] a, int64[1] b) => (y) { y = Slice (x, a, b) }")
    node = value(model, "y").producer()
    assert node is not None
    assert not uniform(node)
