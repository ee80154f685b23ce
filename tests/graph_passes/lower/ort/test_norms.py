"""Norms, with the sum in front of them and without."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.lower.ort.norms import lower_norms
from tests.support.graphs import Arrays, op_types, run
from tests.support.ort_lowering import small

HEAD = "g (float[B,T,24] a, float[B,T,24] b, float[24] w) => (float[B,T,24] y, float[B,T,24] s)"
SUM = HEAD + " { s = Add (a, b) y = cierzo.RMSNorm <epsilon = 1e-5> (s, w) }"
SPREAD = SUM.replace("float[B,T,24] b", "float[24] b")
TWO_NORMS = """g (float[B,T,24] a, float[B,T,24] b, float[24] w)
    => (float[B,T,24] y, float[B,T,24] z, float[B,T,24] u)
{
    s = Add (a, b)
    u = Neg (s)
    y = cierzo.RMSNorm <epsilon = 1e-5> (s, w)
    z = cierzo.RMSNorm <epsilon = 1e-3> (s, w)
}"""
HEADS = """g (float[B,T,3,8] a, float[8] w) => (float[B,T,3,8] y) { y = cierzo.RMSNorm <epsilon = 1e-6> (a, w) }"""
SUM_OF_HEADS = """g (float[B,T,3,8] a, float[B,T,3,8] b, float[8] w) => (float[B,T,3,8] y) {
    s = Add (a, b)
    y = cierzo.RMSNorm <epsilon = 1e-6> (s, w)
}"""
STORED = """g (float[B,T,24] a, float[B,T,24] b, float[24] f) => (float[B,T,24] y, float[B,T,24] s) {
    s = Add (a, b)
    v = Cast <to = 16> (f)
    w = Cast <to = 1> (v)
    y = cierzo.RMSNorm <epsilon = 1e-5> (s, w)
}"""
PRODUCT = SUM.replace("Add", "Mul")
SKIP, NORM = "SkipSimplifiedLayerNormalization", "RMSNormalization"


def feeds(model: ir.Model) -> Arrays:
    rng = np.random.default_rng(1)
    made: Arrays = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [extent if isinstance(extent, int) else 3 for extent in value.shape]
        made[str(value.name)] = rng.standard_normal(shape).astype(value.dtype.numpy())
    for name in {"a", "b"} & made.keys():  # a row such as the epsilon outweighs, and one of zeros
        made[name][0] = made[name][0] * np.float32(1e-3)
        made[name][1] = 0
    return made


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        (SUM, [SKIP]),
        (SPREAD, ["Add", NORM]),
        (TWO_NORMS, [SKIP, "Neg", NORM]),
        (HEADS, [NORM]),
        (SUM_OF_HEADS, ["Add", NORM]),
        (STORED, ["Cast", "Cast", SKIP]),
        (PRODUCT, ["Mul", NORM]),
    ],
)
def test_norms(text: str, ops: list[str]) -> None:
    model = small(text)
    given = feeds(model)
    want = run(model, given)
    assert lower_norms(model) == text.count("RMSNorm")
    model.graph.sort()
    assert sorted(op_types(model)) == sorted(ops)
    got = run(model, given)
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_sums_of_rows_of_unknown_extents_stay_nodes() -> None:
    """Two extents without names may differ, and one of them be 1."""
    model = small(SUM)
    node = model.graph.node(0)
    for value in (*node.inputs, *node.outputs):
        assert value is not None
        value.shape = ir.Shape([None, None, 24])
    lower_norms(model)
    assert op_types(model) == ["Add", NORM]
