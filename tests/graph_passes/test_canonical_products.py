"""Products over heads in canonical form: a Transpose of four axes stands behind them, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.graphs import assert_same_outputs, canonical, op_types, parse

EINSUM = """g (float[B,4,T,S] w, float[B,4,S,6] v) => (float[B,T,4,6] y) {{
    y = Einsum <equation = "{equation}"> (w, v)
}}"""

GROUPED = """g (float[B,2,3,T,S] w, float[B,2,1,S,6] v) => (float[{shape}] y) <float[B,2,3,T,6] product> {{
    product = MatMul (w, v)
    y = Transpose <perm = [{perm}]> (product)
}}"""


def feeds(w: tuple[int, ...], v: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"w": rng.standard_normal(w, dtype=np.float32), "v": rng.standard_normal(v, dtype=np.float32)}


@pytest.mark.parametrize("equation", ["bhts,bhsd->bthd", "bhts, bhsd -> bthd"])
def test_an_einsum_names_its_axes_in_the_order_of_its_factors(equation: str) -> None:
    text = EINSUM.format(equation=equation)
    model = canonical(text)
    assert op_types(model) == ["Einsum", "Transpose"]
    assert model.graph[0].attributes["equation"].as_string() == "bhts,bhsd->bhtd"
    assert [*map(str, model.graph[0].outputs[0].shape or ())] == ["B", "4", "T", "6"]
    assert_same_outputs(parse(text), model, feeds((2, 4, 3, 5), (2, 4, 5, 6)))


@pytest.mark.parametrize("equation", ["bhts,bhsd->bhtd", "...ts,...sd->...td", "bhts,bhsd"])
def test_other_einsums_stay(equation: str) -> None:
    text = EINSUM.format(equation=equation).replace("float[B,T,4,6] y", "float[P,Q,R,U] y")
    if "->" not in equation:
        text = text.replace("[P,Q,R,U] y", "[T,D] y")
    assert op_types(canonical(text)) == ["Einsum"]


@pytest.mark.parametrize(
    ("perm", "shape"), [("0, 3, 1, 2, 4", "B,T,2,3,6"), ("0, 1, 2, 4, 3", "B,2,3,6,T"), ("3, 0, 1, 2, 4", "T,B,2,3,6")]
)
def test_a_turned_product_of_five_axes_joins_those_that_stay_together(perm: str, shape: str) -> None:
    text = GROUPED.format(perm=perm, shape=shape)
    model = canonical(text)
    assert op_types(model) == ["MatMul", "Reshape", "Transpose", "Reshape"]
    assert len(model.graph[2].outputs[0].shape or ()) == 4
    assert_same_outputs(parse(text), model, feeds((2, 2, 3, 4, 5), (2, 2, 1, 5, 6)))


def test_axes_that_part_are_not_joined() -> None:
    text = GROUPED.format(perm="0, 2, 3, 1, 4", shape="B,3,T,2,6")
    assert op_types(canonical(text)) == ["MatMul", "Transpose"]
