"""Weights in the types that they are stored in: initializers, nodes and numbers after lowering, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes import pipeline
from graph_passes.lower.formats import TYPES, LinearFormat, Quantized, Stored
from graph_passes.lower.linears import lower_linears
from graph_passes.unbound import is_unbound
from runtime.errors import FusionError
from tests.graph_passes import oracles
from tests.graph_passes.conftest import Template
from tests.graph_passes.lowering import HALVES, QUANTIZED, bound, fused, quantized, rounded, weights
from tests.graph_passes.op_cases import of_127ths
from tests.graph_passes.texts import NORM
from tests.support.graphs import Arrays, check, mutate, op_types, run, serialised, statements

EMBEDDING, HEAD, WEIGHT = "embed_tokens.weight", "lm_head.weight", "layers.0.mlp.up_proj.weight"
TEXT = """g (int64[N] ids, float[12,12] weight, float[10,12] embedding) => (float[N,12] y, float[N,10] logits) {
    x = Gather <axis = 0> (embedding, ids)
    y = Gemm <transB = 1> (x, weight)
    logits = Gemm <transB = 1> (y, embedding)
}"""
"""An embedding that is the head as well, and one matrix between."""


def tied() -> ir.Model:
    return fused(TEXT, {"weight": WEIGHT, "embedding": EMBEDDING})


IDS: Arrays = {"ids": np.array([3, 0, 9, 3], np.int64)}


@pytest.mark.parametrize("form", HALVES, ids=str)
def test_two_byte_weights_are_read_as_they_are(form: Stored) -> None:
    model, formats = tied(), {EMBEDDING: form, WEIGHT: form}
    values = weights(model)
    want = run(bound(model, rounded(values, formats)), IDS)
    lower_linears(model, formats)
    check(bound(model, values))
    assert {name: value.dtype for name, value in model.graph.initializers.items()} == dict.fromkeys(
        formats, TYPES[form.dtype]
    )
    assert statements(model) == [
        f"x__stored = Gather({EMBEDDING}, ids)",
        "x = Cast(x__stored)",
        f"y = cierzo.StoredMatMul(x, {WEIGHT})",
        f"logits = cierzo.StoredMatMul(y, {EMBEDDING})",
    ]
    assert model.graph[0].outputs[0].dtype == TYPES[form.dtype]
    got = run(bound(model, values), IDS)
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_what_is_not_named_and_what_is_float32_stays() -> None:
    model = tied()
    before = serialised(model)
    lower_linears(model, {WEIGHT: Stored("F32")})
    assert serialised(model) == before


def test_an_embedding_that_is_read_twice_is_widened_twice() -> None:
    text = mutate(
        TEXT,
        ("int64[N] ids", "int64[N] ids, int64[N] others"),
        ("x = Gather <axis = 0> (embedding, ids)",
         "a = Gather <axis = 0> (embedding, ids) b = Gather <axis = 0> (embedding, others) x = Add (a, b)"),
    )  # fmt: skip
    model, formats = fused(text, {"weight": WEIGHT, "embedding": EMBEDDING}), {EMBEDDING: Stored("BF16")}
    values = weights(model)
    want = run(bound(model, rounded(values, formats)), IDS | {"others": IDS["ids"][::-1].copy()})
    lower_linears(model, formats)
    assert op_types(model)[:5] == ["Gather", "Cast", "Gather", "Cast", "Add"]
    got = run(bound(model, values), IDS | {"others": IDS["ids"][::-1].copy()})
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("form", QUANTIZED, ids=str)
def test_a_quantised_matrix_is_three_initializers_of_another_node(form: Quantized) -> None:
    text = """g (float[N,40] x, float[5,40] weight) => (float[N,5] y) {
        y = Gemm <transB = 1> (x, weight)
    }"""
    model = fused(text, {"weight": WEIGHT})
    node = model.graph[0]
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.0', 'up_proj']"
    name, metadata = node.name, dict(node.metadata_props)
    lower_linears(model, {WEIGHT: form})
    values, wide = quantized(WEIGHT, (5, 40), form)
    assert set(model.graph.initializers) == set(values)
    assert statements(model) == [f"y = cierzo.QuantizedMatMul({', '.join(['x', *values])})"]
    (node,) = model.graph
    attributes = {key: node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size")}
    assert attributes == {"K": 40, "N": 5, "bits": form.bits, "block_size": form.block_size}
    assert (node.name, dict(node.metadata_props)) == (name, metadata)
    assert [function.name for function in model.functions.values()] == ["QuantizedMatMul"]
    assert model.opset_imports["com.microsoft"] == 1
    whole = bound(model, values)
    check_initializers = {key: value.dtype for key, value in model.graph.initializers.items()}
    assert check_initializers == {
        key: ir.DataType.UINT8 if array.dtype == np.uint8 else TYPES[form.scale] for key, array in values.items()
    }
    x = of_127ths(np.random.default_rng(0).standard_normal((3, 40)), form.block_size)
    np.testing.assert_allclose(run(whole, {"x": x})["y"], oracles.product(x, wide), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("embedding", [Stored("F32"), *HALVES], ids=str)
def test_a_tied_embedding_may_have_a_quantised_head_beside_it(embedding: Stored) -> None:
    """The product reads numbers of its own; the rows are still looked up in the embedding."""
    model, form = tied(), Quantized(4, 16, True, "F16")
    values = weights(model)
    lower_linears(model, {EMBEDDING: embedding, HEAD: form})
    head, wide = quantized(HEAD, (10, 12), form)
    assert set(model.graph.initializers) == {EMBEDDING, WEIGHT, *head}
    assert model.graph.initializers[EMBEDDING].dtype == TYPES[embedding.dtype]
    assert {use.node.op_type for use in model.graph.initializers[EMBEDDING].uses()} == {"Gather"}
    assert op_types(model)[-2:] == ["StoredMatMul", "QuantizedMatMul"]
    # What the head gets is such that no rounding of its activations is left to the engine.
    values[EMBEDDING] = of_127ths(np.random.default_rng(1).standard_normal((10, 12)), 16)
    values[WEIGHT] = np.eye(12, dtype=np.float32)
    got = run(bound(model, values | head), IDS)
    x = values[EMBEDDING][IDS["ids"]]
    np.testing.assert_array_equal(got["y"], x)
    np.testing.assert_allclose(got["logits"], oracles.product(x, wide), rtol=2e-5, atol=2e-5)


NORMED = mutate(NORM, ("=> (float[B,T,12] y)", "=> (float[B,T,12] z)"), ("\n}", "\n    z = MatMul (y, t)\n}"))
NORMED = mutate(
    NORMED, ("float[12] weight", "float[12] weight, float[12,12] matrix"), ("two =", "t = Transpose (matrix) two =")
)
FORM = Quantized(4, 16, False, "F16")


@pytest.mark.parametrize(
    ("formats", "reason"),
    [
        ({EMBEDDING: FORM}, f"The weight {EMBEDDING} is to be Quantized"),  # rows are looked up in it
        ({HEAD: Stored("BF16")}, f"The weight {HEAD} is to be Stored"),  # which the embedding holds
        ({"layers.7.mlp.up_proj.weight": Stored("BF16")}, "The weight layers.7.mlp.up_proj.weight is to be"),
        ({"layers.7.mlp.up_proj.weight": FORM}, "The weight layers.7.mlp.up_proj.weight is to be"),
    ],
    ids=["quantised embedding", "a head of its own", "no such weight", "no such quantised weight"],
)
def test_a_format_that_no_node_can_read_is_refused(formats: Mapping[str, LinearFormat], reason: str) -> None:
    with pytest.raises(FusionError, match=re.escape(reason)):
        lower_linears(tied(), formats)


@pytest.mark.parametrize("form", HALVES, ids=str)
def test_a_norm_reads_float32_only(form: Stored) -> None:
    model = fused(NORMED, {"weight": "norm.weight", "matrix": WEIGHT})
    assert op_types(model) == ["RMSNorm", "StoredMatMul"]
    with pytest.raises(FusionError, match=rf"RMSNorm .* cannot read the weight norm\.weight as {form.dtype}"):
        lower_linears(model, {"norm.weight": form, WEIGHT: form})


def test_a_weight_that_is_gathered_from_as_an_index_is_refused() -> None:
    """Only what a Gather looks up in may have two bytes."""
    text = """g (float[N,12] x, float[12,12] weight) => (float[N,12] y, float[12,12] low) {
        y = Gemm <transB = 1> (x, weight)
        low = Neg (weight)
    }"""
    with pytest.raises(FusionError, match=rf"Neg .* cannot read the weight {re.escape(WEIGHT)} as F16"):
        lower_linears(fused(text, {"weight": WEIGHT}), {WEIGHT: Stored("F16")})
    with pytest.raises(FusionError, match=rf"The weight {re.escape(WEIGHT)} is to be Quantized"):
        lower_linears(fused(text, {"weight": WEIGHT}), {WEIGHT: FORM})


def test_a_whole_model_computes_the_step_with_its_weights_in_two_bytes(mixture: Template) -> None:
    """Every matrix of the traced template in bfloat16, the same numbers as with these widened."""
    model, given = mixture.model(), mixture.feeds()
    pipeline.run(model, mixture.expected, proving=False)
    formats = {
        name: Stored("BF16")
        for name, value in model.graph.initializers.items()
        if is_unbound(value) and len(value.shape or ()) > 1
    }
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in formats} >= {
        "embed_tokens",
        "q_proj",
        "moe",
        "router",
    }
    values = weights(model)
    want = run(bound(model, rounded(values, formats)), given)
    lower_linears(model, formats)
    got = run(bound(model, values), given)
    for name, old in want.items():
        rows = [slice(0, n) for n in given["token_counts"]] if name == "logits" else [slice(None)] * 3
        for row, taken in enumerate(rows):
            np.testing.assert_allclose(got[name][row, taken], old[row, taken], rtol=1e-4, atol=2e-5, err_msg=name)
