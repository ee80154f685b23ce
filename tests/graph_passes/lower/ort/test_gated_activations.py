"""SwiGLU without the casts around it: as exact as its type allows, and what overflows shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from graph_passes.lower.ort.gated_activations import lower_gated_activations
from tests.graph_passes.lower.ort.operator_cases import gated
from tests.support.graphs import Arrays, op_types, run
from tests.support.ort_lowering import small

WIDE = """g (float[B,T,40] gate, float[B,T,40] up) => (float[B,T,40] y) {
    y = cierzo.GatedActivation <activation = "silu"> (gate, up)
}"""


def feeds(dtype: npt.DTypeLike) -> Arrays:
    rng = np.random.default_rng(2)
    gate: npt.NDArray[Any] = (4 * rng.standard_normal((2, 3, 40))).astype(dtype)
    gate[0, 0, :4] = [0, -9, 9, -40]
    return {"gate": gate, "up": rng.standard_normal((2, 3, 40)).astype(dtype)}


def test_in_float32() -> None:
    model = small(WIDE)
    want = run(model, feeds(np.float32))["y"]
    assert lower_gated_activations(model) == 1
    assert op_types(model) == ["ScaledSiLU", "Mul"]
    np.testing.assert_allclose(run(model, feeds(np.float32))["y"], want, rtol=1e-5, atol=1e-6)


def test_in_float16() -> None:
    """Three roundings instead of one, each of half a unit in the last place: also where the gate is far below zero."""
    model = gated()
    want = run(model, feeds(np.float16))["y"].astype(np.float32)
    assert lower_gated_activations(model) == 1
    assert op_types(model) == ["Cast", "Cast", "ScaledSiLU", "Mul", "Identity"]
    got = run(model, feeds(np.float16))["y"]
    assert got.dtype == np.float16
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=3 * 2.0**-11, atol=2.0**-23)


def test_what_overflows_shows() -> None:
    model = gated()
    lower_gated_activations(model)
    given = feeds(np.float16)
    given["gate"][:], given["up"][:] = 500, 400  # 2e5, where float16 ends at 65504
    assert np.isinf(run(model, given)["y"]).all()
    given["gate"][:], given["up"][:] = np.inf, 0
    assert np.isnan(run(model, given)["y"]).all()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu2"])
def test_other_activations_keep_their_bodies(activation: str) -> None:
    model = gated(activation=activation)
    before = op_types(model)
    assert lower_gated_activations(model) == 0
    assert op_types(model) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y = Identity (narrow)", "y = Identity (narrow) also = Neg (gated)"),  # somebody else reads it in float32
        ("wide_up = Cast <to = 1> (up)", "half = Cast <to = 16> (up) wide_up = Cast <to = 1> (half)"),  # another type
        ("wide_up = Cast <to = 1> (up)", "cast = Cast <to = 1> (up) wide_up = Neg (cast)"),  # computed in float32
        ("narrow = Cast <to = 10> (gated)", "other = Cast <to = 16> (gated) narrow = Cast <to = 10> (other)"),
    ],
)
def test_what_is_float32_for_a_reason_stays_so(old: str, new: str) -> None:
    model = gated(old=old, new=new)
    if "also" in new:
        model.graph.outputs.append(
            next(value for node in model.graph for value in node.outputs if value.name == "also")
        )
    want = run(model, feeds(np.float16))
    assert lower_gated_activations(model) == 1
    (node,) = [node for node in model.graph if node.op_type == "ScaledSiLU"]
    assert node.outputs[0].dtype is not None
    assert node.outputs[0].dtype.name == "FLOAT"
    got = run(model, feeds(np.float16))
    for name in want:
        np.testing.assert_allclose(got[name].astype(np.float32), want[name].astype(np.float32), rtol=2e-3, atol=1e-6)
