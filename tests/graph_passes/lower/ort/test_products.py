"""Products on ONNX Runtime's kernels: what they compute, in what type weights are read, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.lower.ort.products import lower_products
from graph_passes.lower.ort.quantized_products import lower_quantized_products
from runtime.errors import FusionError
from tests.graph_passes.lower.ort.operator_cases import TYPES, quantized, stored
from tests.support.graphs import Arrays, op_types, run
from tests.support.ort_lowering import exact_products


def feeds(model: ir.Model, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    made: Arrays = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [extent if isinstance(extent, int) else 3 for extent in value.shape]
        if value.dtype == ir.DataType.UINT8:
            made[str(value.name)] = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            made[str(value.name)] = (rng.standard_normal(shape) / 8).astype(value.dtype.numpy())
    return made


@pytest.mark.parametrize("weight", ["float", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", ["float", "float16"])
def test_stored_products(rows: str, weight: str) -> None:
    model = stored(rows, weight)
    given = feeds(model)
    want = run(model, given)["y"]
    assert lower_products(model) == 1
    assert op_types(model) == ["Cast", *["Cast"] * (rows != weight), "FusedMatMul"]
    assert [value.dtype for value in model.graph.node(-1).inputs if value] == [TYPES[rows]] * 2
    step = 2.0**-10 if rows == "float16" else 2.0**-20
    np.testing.assert_allclose(run(model, given)["y"], want, rtol=4 * step, atol=4 * step)


@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 32), (4, 128), (8, 32), (8, 256)])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("K", [256, 72])
def test_quantised_products(bits: int, size: int, zero: bool, K: int) -> None:
    """72 ends in a part of a block."""
    model = exact_products(quantized("float", "float16", K, 20, bits, size, zero))
    given = feeds(model)
    want = run(model, given)["y"]
    assert lower_quantized_products(model) == 1
    assert op_types(model) == ["Cast", "MatMulNBits"]
    node = model.graph.node(-1)
    assert {key: node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size")} == {
        "K": K, "N": 20, "bits": bits, "block_size": size,
    }  # fmt: skip
    np.testing.assert_allclose(run(model, given)["y"], want, rtol=1e-5, atol=1e-5)


def test_a_nan_among_the_rows_shows() -> None:
    model = quantized("float", "float", 64, 4, 4, 32)
    lower_quantized_products(model)
    given = feeds(model)
    given["x"][1, 2, 5] = np.nan
    hurt = np.isnan(run(model, given)["y"])
    assert hurt[1, 2].all()
    assert hurt.sum() == 4


def test_scales_of_the_type_of_the_rows_are_read_as_they_are() -> None:
    model = quantized("float16", "float16", 64, 4, 4, 32)
    lower_quantized_products(model)
    assert op_types(model) == ["MatMulNBits"]


@pytest.mark.parametrize(("rows", "scale"), [("bfloat16", "float16"), ("float16", "float"), ("bfloat16", "float")])
def test_scales_are_not_rounded_again(rows: str, scale: str) -> None:
    spelled = {"float": "float32"}.get(scale, scale)
    with pytest.raises(FusionError, match=rf"have {spelled} scales.*to {rows}.*--arithmetic {spelled}"):
        lower_quantized_products(quantized(rows, scale, 64, 4, 4, 32))


def test_blocks_that_the_kernels_lack_are_refused() -> None:
    with pytest.raises(FusionError, match=r"blocks of 256 numbers.*at most 128 for 4 bits.*--block-size 128"):
        lower_quantized_products(quantized("float16", "float16", 512, 4, 4, 256))
