"""The walks that matchers share: what they pass, where they end, and how they name the end."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from graph_passes.fuse.walk import REARRANGEMENTS, back, cone, forward, only_reader, unexpected
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
