"""What lowering for engines does to a graph: types, merged products, dequantised weights; and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.lower.arithmetic import lower_arithmetic
from graph_passes.lower.dequantize import dequantize_products
from graph_passes.lower.formats import Quantized, Stored
from graph_passes.lower.linears import lower_linears
from graph_passes.lower.products import merge_products
from runtime.errors import FusionError
from tests.graph_passes.lowering import bound, fused, quantized, weights
from tests.support.graphs import Arrays, check, run, statements

TEXT = """g (float[N,16] x, float[8,16] query, float[4,16] key, float[4,16] value, float[16,4] down, float[N,8] other)
    => (float[N,8] q, float[N,4] k, float[N,16] y, float[N,8] z) {
    q = Gemm <transB = 1> (x, query)
    k = Gemm <transB = 1> (x, key)
    v = Gemm <transB = 1> (x, value)
    y = Gemm <transB = 1> (v, down)
    z = Add (q, other)
}"""
NAMES = {name: f"layers.0.self_attn.{name}_proj.weight" for name in ("query", "key", "value")} | {
    "down": "layers.0.down.weight"
}
FEEDS: Arrays = {
    "x": np.random.default_rng(1).standard_normal((3, 16), dtype=np.float32),
    "other": np.random.default_rng(2).standard_normal((3, 8), dtype=np.float32),
}


def model() -> ir.Model:
    return fused(TEXT, NAMES)


def stored(form: str) -> tuple[ir.Model, Arrays]:
    lowered, values = model(), weights(model())
    lower_linears(lowered, {name: Stored(form) for name in values})
    return lowered, values


def test_products_are_narrow_and_the_rest_is_wide() -> None:
    lowered, values = stored("F16")
    want = run(bound(lowered, values), FEEDS)
    lower_arithmetic(lowered, "float16", "float16")
    check(bound(lowered, values))
    types = {str(v.name): v.dtype for node in lowered.graph for v in node.outputs}
    assert types["x.float16"] == types["v"] == ir.DataType.FLOAT16
    assert types["z"] == ir.DataType.FLOAT
    assert [output.dtype for output in lowered.graph.outputs] == [ir.DataType.FLOAT] * 4
    assert [str(output.name) for output in lowered.graph.outputs] == ["q", "k", "y", "z"]
    # x is cast once for its three readers, and v, which is narrow already, not at all.
    assert sum("Cast(x)" in line for line in statements(lowered)) == 1
    assert not any("Cast(v)" in line for line in statements(lowered))
    got = run(bound(lowered, values), FEEDS)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=0.02 * np.abs(want[name]).max())


def test_float32_arithmetic_changes_nothing() -> None:
    lowered, _ = stored("F32")
    before = statements(lowered)
    lower_arithmetic(lowered, "float32", "float32")
    assert statements(lowered) == before


def test_an_operator_whose_types_are_not_known_is_refused() -> None:
    lowered, _ = stored("F16")
    node = next(node for node in lowered.graph if node.domain == "cierzo")
    node.op_type = "RollingAttentionInt8"
    with pytest.raises(FusionError, match=r"RollingAttentionInt8 .* cannot be built with bfloat16"):
        lower_arithmetic(lowered, "bfloat16", "bfloat16")


def test_products_of_the_same_rows_become_one() -> None:
    lowered, values = stored("F32")
    want = run(bound(lowered, values), FEEDS)
    assert merge_products(lowered) == 3
    check(bound(lowered, values))
    assert [node.op_type for node in lowered.graph] == ["Concat", "StoredMatMul", "Split", "StoredMatMul", "Add"]
    whole = lowered.graph[0].outputs[0]
    assert whole.name == "layers.0.self_attn.query_proj+key_proj+value_proj.weight"
    assert whole.shape == ir.Shape([16, 16])
    got = run(bound(lowered, values), FEEDS)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-5)


def test_products_in_different_types_stay_apart() -> None:
    lowered, values = model(), weights(model())
    kinds = dict(zip(values, ("F16", "F32", "F32", "F32"), strict=True))
    lower_linears(lowered, {name: Stored(kind) for name, kind in kinds.items()})
    assert merge_products(lowered) == 2
    assert sum(node.op_type == "StoredMatMul" for node in lowered.graph) == 3


def test_quantised_products_become_one_and_are_dequantised() -> None:
    form = Quantized(4, 16, False, "F16")
    lowered, values = model(), weights(model())
    names = [name for name in values if "self_attn" in name]
    lower_linears(lowered, dict.fromkeys(names, form))
    packed: Arrays = {}
    wide = dict(values)
    for name in names:
        made, wide[name] = quantized(name, values[name].shape, form)
        packed |= made
    want = run(bound(model(), wide), FEEDS)
    merge_products(lowered)
    asked: list[tuple[str, ir.DataType, tuple[int, ...], bool]] = []

    def bind(value: ir.Value, dtype: ir.DataType, shape: Sequence[int], fuses: bool) -> ir.Value:
        asked.append((str(value.name), dtype, tuple(shape), fuses))
        maker = value.producer()
        assert maker is not None
        data = np.concatenate([packed[str(part.name)] for part in maker.inputs if part is not None])
        if dtype == ir.DataType.INT4:
            tensor = ir.tensor(_signed(data, shape), dtype=dtype, name=f"{value.name}.made")
        else:
            tensor = ir.tensor(data.astype(np.float32), name=f"{value.name}.made")
        made = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
        lowered.graph.register_initializer(made)
        return made

    assert dequantize_products(lowered, ir.DataType.FLOAT, bind) == 1
    assert [item[1:] for item in asked] == [
        (ir.DataType.INT4, (16, 16), True),
        (ir.DataType.FLOAT, (16, 1), True),
    ]
    dequantize = next(node for node in lowered.graph if node.op_type == "DequantizeLinear")
    assert (dequantize.attributes["axis"].as_int(), dequantize.attributes["block_size"].as_int()) == (1, 16)
    concats = [node for node in lowered.graph if node.op_type == "Concat"]
    lowered.graph.remove(concats, safe=True)
    for name in packed:
        lowered.graph.initializers.pop(name)
    rest = {name: value for name, value in values.items() if name not in names}
    got = run(bound(lowered, rest), FEEDS)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


def _signed(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    flat = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8) - 8
    return flat.reshape(shape)


def _never(value: ir.Value, dtype: ir.DataType, shape: Sequence[int], fuses: bool) -> ir.Value:
    raise AssertionError("refused before any weight is asked for")


def test_zero_points_are_refused() -> None:
    lowered = model()
    lower_linears(lowered, dict.fromkeys(NAMES.values(), Quantized(4, 16, True, "F16")))
    with pytest.raises(FusionError, match=r"have zero points.*--no-zero-points"):
        dequantize_products(lowered, ir.DataType.FLOAT16, _never)


def test_rows_of_no_whole_number_of_blocks_are_refused() -> None:
    lowered = model()
    lower_linears(lowered, dict.fromkeys(NAMES.values(), Quantized(4, 32, False, "F16")))
    with pytest.raises(FusionError, match=r"rows of 16 weights are no whole number of blocks of 32.*--block-size"):
        dequantize_products(lowered, ir.DataType.FLOAT16, _never)


def test_scales_are_not_rounded_again() -> None:
    lowered = model()
    lower_linears(lowered, dict.fromkeys(NAMES.values(), Quantized(4, 16, False, "F32")))
    with pytest.raises(FusionError, match=r"float32 scales.*to float16.*--scales"):
        dequantize_products(lowered, ir.DataType.FLOAT16, _never)


ROUTED = """g (float[N,16] x, float[4,16] router, float[8,16] query)
    => (float[N,2] weights, int64[N,2] experts, float[N,8] q) {
    logits = Gemm <transB = 1> (x, router)
    weights, experts = cierzo.MoEGate <top_k = 2> (logits)
    q = Gemm <transB = 1> (x, query)
}"""


@pytest.mark.parametrize("form", [Stored("F16"), Quantized(8, 16, False, "F16")], ids=str)
def test_routers_stay_wide_also_where_they_came_quantised(form: Stored | Quantized) -> None:
    """A rounded logit may send a token to another expert."""
    names = {"router": "layers.0.moe.router.weight", "query": "layers.0.query.weight"}
    lowered = fused(ROUTED, names)
    lower_linears(lowered, dict.fromkeys(names.values(), form))
    lower_arithmetic(lowered, "float16", "float16")
    types = {str(v.name): v.dtype for node in lowered.graph for v in node.inputs if v is not None}
    logits = next(node for node in lowered.graph if node.op_type == "MoEGate").inputs[0]
    assert logits is not None
    product = logits.producer()
    assert product is not None
    assert logits.dtype == types["x"] == ir.DataType.FLOAT
    assert next(str(v.name) for v in product.inputs if v is not None) == "x"
    other = next(node for node in lowered.graph if "MatMul" in node.op_type and node is not product)
    assert next(str(v.name) for v in other.inputs if v is not None) == "x.float16"
