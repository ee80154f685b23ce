"""Linear layers: which products become a node that reads a weight as it is stored, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from graph_passes.driver import apply
from graph_passes.fuse import linear
from tests.graph_passes.gallery.tracing import trace
from tests.graph_passes.texts import LINEAR, fuse, refusal
from tests.support.graphs import assert_same_outputs, bind, canonical, mutate, op_types, parse, run, statements, unbind

WEIGHT = ("weight",)
BIASED = mutate(
    LINEAR, ("float[10,12] weight", "float[10,12] weight, float[10] bias"), ("(x, weight)", "(x, weight, bias)")
)
BY_MATMUL = mutate(
    LINEAR, ("y = Gemm <transB = 1> (x, weight)", "turned = Transpose <perm = [1, 0]> (weight) y = MatMul (x, turned)")
)


def x(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 12), dtype=np.float32)


@pytest.mark.parametrize(
    "text",
    [
        LINEAR,
        mutate(LINEAR, ("<transB = 1>", "<transA = 0, transB = 1, alpha = 1.0, beta = 7.0>")),
        BY_MATMUL,
        mutate(BY_MATMUL, ("Transpose <perm = [1, 0]>", "Transpose")),
    ],
)
def test_fuses(text: str) -> None:
    model, (record,) = fuse(text, linear.RULE, weights=WEIGHT)
    assert statements(model) == ["y = cierzo.StoredMatMul(x, weight)"]
    assert (record.attributes, record.precision) == ({}, "float64")
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": x(5)})


@pytest.mark.parametrize(("leading", "shape"), [("", ()), ("B,T,", (2, 3)), ("A,B,T,", (2, 1, 3))])
def test_fuses_rows_under_any_axes(leading: str, shape: tuple[int, ...]) -> None:
    text = BY_MATMUL.replace("[N,12]", f"[{leading}12]").replace("[N,10]", f"[{leading}10]")
    model, _ = fuse(text, linear.RULE, weights=WEIGHT)
    assert op_types(model) == ["StoredMatMul"]
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": x(*shape)})


def test_one_weight_may_be_read_twice() -> None:
    text = mutate(
        BY_MATMUL, ("=> (float[N,10] y)", "=> (float[N,10] y, float[N,10] z)"), ("}", "z = MatMul (y, y_t)\n}")
    )
    text = mutate(text, ("z = MatMul (y, y_t)", "more = Neg (x) z = MatMul (more, turned)"))
    model, records = fuse(text, linear.RULE, weights=WEIGHT)
    assert op_types(model) == ["StoredMatMul", "Neg", "StoredMatMul"]
    assert len(records) == 2
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": x(5)})


@pytest.mark.parametrize("shape", ["10", "1,10", "N,10", "1", "N,1", "1,1", ""])
def test_a_bias_becomes_an_addition(shape: str) -> None:
    text = BIASED.replace("float[10] bias", f"float[{shape}] bias" if shape else "float bias")
    model, _ = fuse(text, linear.RULE, weights=WEIGHT)
    assert op_types(model) == ["StoredMatMul", "Add"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    extents = [{"N": 5}.get(extent) or int(extent) for extent in shape.split(",") if extent]
    bias = np.random.default_rng(1).standard_normal(extents).astype(np.float32)
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": x(5), "bias": bias})


def test_a_bias_goes_where_its_product_went() -> None:
    """The Add takes over name, readers and module path."""
    text = mutate(BIASED, ("y = Gemm", "h = Gemm"), ("bias)\n}", "bias)\n    n = Neg (h)\n    y = Add (n, h)\n}"))
    model = canonical(text, "weight", "bias")
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'layers.0', 'layers.0.q_proj', '{node.name}']"
    gemm = model.graph[0].name
    ((record,), _) = apply(model, linear.RULE)
    assert statements(model) == [
        "h__product = cierzo.StoredMatMul(x, weight)",
        "h = Add(h__product, bias)",
        "n = Neg(h)",
        "y = Add(n, h)",
    ]
    assert (record.scope, record.node) == ("layers.0.q_proj", f"{gemm}__StoredMatMul")
    product, bias = model.graph[0], model.graph[1]
    scopes = "pkg.torch.onnx.name_scopes"
    assert product.metadata_props[scopes] == bias.metadata_props[scopes]
    assert len({node.name for node in model.graph}) == 4
    assert_same_outputs(bind(unbind(parse(text), "weight", "bias")), bind(model), {"x": x(5)})


def _by_module(bias: bool) -> Callable[..., Tensor]:
    module = nn.Linear(12, 10, bias=bias)
    if bias:
        return lambda x, weight, bias: functional_call(module, {"weight": weight, "bias": bias}, (x,))
    return lambda x, weight: functional_call(module, {"weight": weight}, (x,))


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (_by_module(False), ["weight"]),
        (_by_module(True), ["weight", "bias"]),
        (F.linear, ["weight"]),
        (F.linear, ["weight", "bias"]),
        (lambda x, weight: x @ weight.T, ["weight"]),
        (lambda x, weight: torch.matmul(x, weight.t()), ["weight"]),
        (lambda x, weight, bias: bias + x @ weight.transpose(0, 1), ["weight", "bias"]),
    ],
)
@pytest.mark.parametrize("leading", [("N",), ("B", "T")], ids=["two axes", "three axes"])
def test_fuses_what_a_tracer_makes_of_it(
    program: Callable[..., Tensor], names: list[str], leading: tuple[str, ...]
) -> None:
    shapes: dict[str, tuple[str | int, ...]] = {"weight": (10, 12), "bias": (10,)}
    traced = trace(program, {"x": (*leading, 12), **{name: shapes[name] for name in names}}, ["y"])
    model = unbind(traced.clone(), *names)
    assert len(apply(model, linear.RULE)[0]) == 1
    assert op_types(model) == ["StoredMatMul", "Add"][: len(names)]
    bound, rows = bind(model), x(*(3, 2)[: len(leading)])
    (y,) = run(bound, {"x": rows}).values()
    values = [bound.graph.initializers[name].const_value for name in names]
    arrays = [torch.from_numpy(value.numpy()) for value in values if value is not None]
    np.testing.assert_allclose(y, program(torch.from_numpy(rows), *arrays).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (mutate(BIASED, ("<transB = 1>", "<transB = 1, beta = 2.0>")), "the product has a bias"),
        (mutate(LINEAR, ("<transB = 1>", "<transB = 1, alpha = 2.0>")), "the product is scaled by 2"),
        (mutate(LINEAR, ("<transB = 1>", "<transA = 1, transB = 1>"), ("[N,12]", "[12,N]")),
         "not a product with the transpose of its second factor"),
        (mutate(LINEAR, ("<transB = 1> ", ""), ("[10,12]", "[12,10]")),
         "not a product with the transpose of its second factor"),
        (mutate(LINEAR, ("(x, weight)", "(x, kernel)"), ("[10,12] weight", "[10,12] kernel")),
         "'kernel' is no weight [N, K]"),
        (mutate(LINEAR, ("(x, weight)", "(x, twice)"), ("y = Gemm", "twice = Add (weight, weight) y = Gemm")),
         "'twice' is no weight [N, K]"),
        (mutate(LINEAR, (", float[10,12] weight", ""), ("(x, weight)", "(x, data)"), ("float[N,10]", "float[N,1]"),
                ("y = Gemm", "data = Constant <value = float[1,12] {1,2,3,4,5,6,7,8,9,1,2,3}> () y = Gemm")),
         "'data' is no weight [N, K]"),
        (mutate(BY_MATMUL, ("turned = Transpose <perm = [1, 0]> (weight)", "turned = Identity (weight)"),
                ("[10,12]", "[12,10]")), "'weight' should come from Transpose, but comes from a graph input or weight"),
        (mutate(BY_MATMUL, ("[1, 0]", "[0, 2, 1]"), ("[10,12]", "[N,10,12]"), ("x, float[N", "x, float[3"),
                ("[N,12]", "[3,4,12]"), ("float[N,10]", "float[3,4,10]")), "the second factor is no transposed matrix"),
        (mutate(BY_MATMUL, ("MatMul (x, turned)", "MatMul (weight, other)"), ("[N,10] y", "[10,N] y"),
                ("turned =", "other = Transpose (x) turned =")), "'x' is no weight [N, K]"),
    ],
    ids=["bias times two", "scaled", "input turned", "weight not turned", "no weight", "computed weight", "constant",
         "matmul not turned", "stack of matrices", "weight on the left"],
)  # fmt: skip
def test_refuses(text: str, reason: str) -> None:
    assert reason in refusal(text, linear.RULE, weights=WEIGHT)


def test_a_product_that_is_refused_keeps_its_sum() -> None:
    """The bias is split off before anything is matched; that alone must change nothing."""
    text = mutate(BIASED, ("<transB = 1>", "<transB = 1, alpha = 0.5>"))
    model = canonical(text, *WEIGHT)
    fused, (refused,) = apply(model, linear.RULE)
    assert fused == []
    assert "the product is scaled by 0.5" in refused.reason
    assert op_types(model) == ["Gemm", "Add"]
    bias = np.arange(10, dtype=np.float32)
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": x(5), "bias": bias})
