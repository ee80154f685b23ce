"""Products of gate and up are two; what else reads a merged product keeps it."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.lower.ort.gated_products import part_gated_products
from tests.support.graphs import op_types, run
from tests.support.ort_lowering import small

STORED = """g (float[B,T,16] x, float[12,16] gate, float[12,16] up) => (float[B,T,12] y)
    <int64[2] sizes = {12, 12}>
{
    weight = Concat <axis = 0> (gate, up)
    product = cierzo.StoredMatMul (x, weight)
    a, b = Split <axis = -1> (product, sizes)
    y = cierzo.GatedActivation <activation = "silu"> (a, b)
}"""
QUANTIZED = """g (float[B,T,32] x, uint8[12,1,16] gate, uint8[12,1,16] up, float[12,1] gate_scale, float[12,1] up_scale)
    => (float[B,T,12] y) <int64[2] sizes = {12, 12}, float[B,T,24] product, float[B,T,12] a, float[B,T,12] b>
{
    weight = Concat <axis = 0> (gate, up)
    scale = Concat <axis = 0> (gate_scale, up_scale)
    product = cierzo.QuantizedMatMul <K = 32, N = 24, bits = 4, block_size = 32> (x, weight, scale)
    a, b = Split <axis = -1> (product, sizes)
    y = cierzo.GatedActivation <activation = "silu"> (a, b)
}"""


def feeds(text: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    made = {}
    for value in small(text).graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [extent if isinstance(extent, int) else 3 for extent in value.shape]
        made[str(value.name)] = (8 + 2 * rng.standard_normal(shape)).astype(value.dtype.numpy())
    return made


@pytest.mark.parametrize("text", [STORED, QUANTIZED])
def test_two_products(text: str) -> None:
    model = small(text)
    want = run(model, feeds(text))["y"]
    assert part_gated_products(model) == 1
    products = [node for node in model.graph if "MatMul" in node.op_type]
    assert [[value.name for value in node.inputs[1:] if value] for node in products] == [
        [name for name in ("gate", "gate_scale") if name in text],
        [name for name in ("up", "up_scale") if name in text],
    ]
    assert "Split" not in op_types(model)
    np.testing.assert_allclose(run(model, feeds(text))["y"], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(a, b)", "(b, a)"),
        ("(a, b)", "(a, a)"),
        ("y = cierzo", "c = Neg (product) y = cierzo"),
        ("y = cierzo", "c = Neg (a) y = cierzo"),
        ("weight = Concat <axis = 0> (gate, up)", "wide = Concat <axis = 0> (gate, up) weight = Neg (wide)"),
        ("product = cierzo.StoredMatMul (x, weight)", "p = cierzo.StoredMatMul (x, weight) product = Neg (p)"),
    ],
)
def test_other_readers_keep_the_merged_product(old: str, new: str) -> None:
    model = small(STORED.replace(old, new))
    before = op_types(model)
    assert part_gated_products(model) == 0
    assert op_types(model) == before
