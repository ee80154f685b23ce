"""RMSNorm: which spellings become a node, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from graph_passes.driver import apply
from graph_passes.driver_types import Match
from graph_passes.fuse import rms_norm
from graph_passes.graph import Refusal, operand
from graph_passes.ops.rms_norm import RMS_NORM
from reference.norm import RMSNorm
from runtime.errors import ProofError
from tests.graph_passes.gallery.tracing import trace
from tests.graph_passes.texts import NORM, fuse, refusal
from tests.support.graphs import assert_same_outputs, bind, mutate, op_types, parse, run, statements, unbind

WEIGHT = ("weight",)
DIVIDED = ("inverse = Reciprocal (root)\n    normed = Mul (x, inverse)", "normed = Div (x, root)")
SQUARE = "square = Pow (x, two)"


def rows(*shape: int) -> np.ndarray:
    """Rows near one, far from it, such as the epsilon outweighs, and of zeros."""
    x = np.random.default_rng(0).standard_normal((4, *shape), dtype=np.float32)
    return x * np.array([1, 1e4, 1e-4, 0], np.float32).reshape(4, *[1] * len(shape))


@pytest.mark.parametrize(
    "spelling",
    [
        [],
        [("Mul (weight, normed)", "Mul (normed, weight)")],
        [("Mul (x, inverse)", "Mul (inverse, x)")],
        [("Add (mean, epsilon)", "Add (epsilon, mean)")],
        [(SQUARE, "square = Mul (x, x)")],
        [("<value_ints = [-1]>", "<value_ints = [2]>")],
        [DIVIDED],
        [DIVIDED, (SQUARE, "square = Mul (x, x)")],
        [("<value_float = 1.0e-5>", "<value_floats = [1.0e-5]>")],
        [("mean = ReduceMean <keepdims = 1>", "mean = ReduceMean")],
    ],
)
def test_fuses(spelling: list[tuple[str, str]]) -> None:
    text = mutate(NORM, *spelling)
    model, (record,) = fuse(text, rms_norm.RULE, weights=WEIGHT)
    assert statements(model) == ["y = cierzo.RMSNorm(x, weight)"]
    assert record.attributes == {"epsilon": pytest.approx(1e-5, rel=1e-6)}
    assert record.precision == "float64"
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": rows(3, 12)})


@pytest.mark.parametrize("leading", ["", "N,", "B,T,4,"])
def test_fuses_rows_under_any_axes(leading: str) -> None:
    text = NORM.replace("[B,T,12]", f"[{leading}12]")
    model, _ = fuse(text, rms_norm.RULE, weights=WEIGHT)
    assert op_types(model) == ["RMSNorm"]
    x = rows(*{"": (), "N,": (), "B,T,4,": (3, 4)}[leading], 12)
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": x if leading else np.asarray(x[0])})


@pytest.mark.parametrize("epsilon", [1e-30, 1e-12, 1e-6, 1e-3, 1.0])
def test_the_epsilon_is_read_off_the_graph(epsilon: float) -> None:
    text = mutate(NORM, ("1.0e-5", f"{epsilon:e}"))
    model, (record,) = fuse(text, rms_norm.RULE, weights=WEIGHT)
    assert record.attributes == {"epsilon": float(np.float32(epsilon))}
    near = np.sqrt(np.float32(epsilon)) * rows(3, 12)
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": near})


def _by_module(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: functional_call(module, {"weight": weight}, (x,))


@pytest.mark.parametrize(
    "program",
    [
        *(
            pytest.param(_by_module(kind(12, 1e-5)), id=f"{kind.__module__}.{kind.__name__}")
            for kind in (RMSNorm, MistralRMSNorm, MixtralRMSNorm, Qwen3RMSNorm)
        ),
        pytest.param(lambda x, weight: x / torch.sqrt((x * x).mean(-1, True) + 1e-5) * weight, id="by the root"),
        pytest.param(lambda x, weight: x * (1e-5 + x.square().mean(2, True)).rsqrt() * weight, id="in one line"),
    ],
)  # fmt: skip
def test_fuses_what_a_tracer_makes_of_it(program: Callable[[Tensor, Tensor], Tensor]) -> None:
    traced = trace(program, {"x": ("B", "T", 12), "weight": (12,)}, ["y"])
    model = unbind(traced.clone(), *WEIGHT)
    ((record,), _) = apply(model, rms_norm.RULE)
    assert op_types(model) == ["RMSNorm"]
    assert record.attributes == {"epsilon": pytest.approx(1e-5, rel=1e-6)}
    bound, x = bind(model), rows(3, 12)
    (y,) = run(bound, {"x": x}).values()
    tensor = bound.graph.initializers["weight"].const_value
    assert tensor is not None
    want = program(torch.from_numpy(x), torch.from_numpy(tensor.numpy())).numpy()
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_what_others_read_of_it_stays() -> None:
    text = mutate(NORM, ("(float[B,T,12] y)", "(float[B,T,12] y, float[B,T,1] mean)"))
    model, _ = fuse(text, rms_norm.RULE, weights=WEIGHT)
    assert op_types(model) == ["Pow", "ReduceMean", "RMSNorm"]
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"x": rows(3, 12)})


def test_the_norm_of_what_lost_its_mean_is_fused_behind_it() -> None:
    """A LayerNorm without bias is an RMSNorm of the centred row."""
    text = mutate(
        NORM,
        ("float[B,T,12] x", "float[B,T,12] raw"),
        (SQUARE, "centre = ReduceMean <keepdims = 1> (raw, axis) x = Sub (raw, centre) square = Pow (x, two)"),
    )
    model, _ = fuse(text, rms_norm.RULE, weights=WEIGHT)
    assert statements(model)[-1] == "y = cierzo.RMSNorm(x, weight)"
    assert_same_outputs(bind(unbind(parse(text), *WEIGHT)), bind(model), {"raw": rows(3, 12)})


OTHER = ("float[12] weight", "float[12] weight, float[B,T,12] other")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        # The mean: another axis, more of them, none left, not the mean.
        ([("<value_ints = [-1]>", "<value_ints = [1]>")], "the mean is not taken over the last axis alone"),
        ([("<value_ints = [-1]>", "<value_ints = [-1, -2]>")], "the mean is not taken over the last axis alone"),
        ([("ReduceMean <keepdims = 1> (square, axis)", "ReduceMean <keepdims = 1> (square)")], "input 1 is missing"),
        ([("<keepdims = 1>", "<keepdims = 0>"), ("[B,T,12] x", "[12,12,12] x"), ("[B,T,12] y", "[12,12,12] y")],
         "the mean square has lost its last axis"),
        ([("ReduceMean <keepdims = 1>", "ReduceSum <keepdims = 1>")], "should come from ReduceMean, but comes from"),
        ([("ReduceMean <keepdims = 1>", "ReduceMax <keepdims = 1>")], "should come from ReduceMean, but comes from"),
        # The square: of something else, another power.
        ([OTHER, ("Pow (x, two)", "Pow (other, two)")], "the mean is not that of the squares of 'x'"),
        ([OTHER, (SQUARE, "square = Mul (x, other)")], "'x' is not squared"),
        ([("<value_float = 2.0>", "<value_float = 4.0>")], "'x' is not squared"),
        ([(SQUARE, "square = Abs (x)")], "should come from Pow or Mul, but comes from Abs"),
        ([OTHER, ("Mul (x, inverse)", "Mul (other, inverse)")], "the mean is not that of the squares of 'other'"),
        # The epsilon: outside the root, not constant, negative, none.
        ([("root = Sqrt (shifted)", "bare = Sqrt (mean) root = Add (bare, epsilon)"), ("Add (mean, ", "Sub (mean, ")],
         "should come from Sqrt, but comes from Add"),
        ([("float[12] weight", "float[12] weight, float epsilon"),
          ("epsilon = Constant <value_float = 1.0e-5> ()", "")], "nothing constant is added to the mean square"),
        ([("1.0e-5", "-1.0e-5")], "-1e-05 is added to the mean square, so that a row of zeros has no norm"),
        ([("Sqrt (shifted)", "Sqrt (mean)")], "should come from Add, but comes from ReduceMean"),
        ([("<value_float = 1.0e-5>", "<value_floats = [1.0e-5, 1.0e-6, 1.0e-5, 1.0e-5]>"), ("T,12] x", "4,12] x"),
          ("T,12] y", "4,12] y")], "nothing constant is added to the mean square"),
        # The root and its reciprocal.
        ([("inverse = Reciprocal (root)", "inverse = Identity (root)")], "should come from Reciprocal"),
        ([("Sqrt (shifted)", "Exp (shifted)")], "should come from Sqrt, but comes from Exp"),
        ([DIVIDED, ("Div (x, root)", "Div (root, x)")], "'x' should come from Sqrt, but comes from a graph input"),
        ([("Mul (x, inverse)", "Add (x, inverse)")], "should come from Mul or Div, but comes from Add"),
        # The weight: none, two of them, moved away from one, of another shape.
        ([("float[12] weight", "float[12] scale"), ("Mul (weight", "Mul (scale")],
         "not one factor is a weight [C]"),
        ([("y = Mul (weight, normed)", "y = Mul (weight, weight)"), ("float[B,T,12] y", "float[12] y")],
         "not one factor is a weight [C]"),
        ([("y = Mul (weight, normed)", "more = Add (weight, two) y = Mul (more, normed)")],
         "not one factor is a weight [C]"),
        ([("float[12] weight", "float[1,12] weight")], "not one factor is a weight [C]"),
        ([("float[12] weight", "float[1] weight")], "C is 1 in 'weight' (weight_C) and 12 elsewhere"),
        ([("[B,T,12] x", "[B,T,1] x"), ("Pow (x, two)", "Pow (x, two)")], "C is 12 in 'weight'"),
        ([("<value_float = 1.0e-5>", "<value = float[1,1,1,1] {0.00001}>"), ("[B,T,12] y", "[1,B,T,12] y")],
         "the axes before the last are not those of the input"),
    ],
)  # fmt: skip
def test_refuses(fault: list[tuple[str, str]], reason: str) -> None:
    assert reason in refusal(mutate(NORM, *fault), rms_norm.RULE, weights=WEIGHT)


def test_a_norm_over_groups_is_refused() -> None:
    """Two means a row, and one weight over the whole width."""
    text = mutate(
        NORM,
        (SQUARE, "pairs = Constant <value_ints = [0, 0, 2, 6]> () x = Reshape (raw, pairs) square = Pow (x, two)"),
        ("float[B,T,12] x", "float[B,T,12] raw"),
        ("normed = Mul (x, inverse)",
         "split = Mul (x, inverse) whole = Constant <value_ints = [0, 0, 12]> () normed = Reshape (split, whole)"),
    )  # fmt: skip
    assert "'normed' should come from Mul or Div, but comes from Reshape" in refusal(
        text, rms_norm.RULE, weights=WEIGHT
    )


def test_a_weight_with_data_is_not_taken_for_a_parameter() -> None:
    data = ", ".join(["0.5"] * 12)
    text = mutate(NORM, (", float[12] weight", ""), ("two =", f"weight = Constant <value_floats = [{data}]> () two ="))
    assert "not one factor is a weight [C]" in refusal(text, rms_norm.RULE)


def test_no_look_alike_gets_past_the_proof() -> None:
    """A matcher that looked at nothing but the ends would still be stopped."""

    def careless(model: ir.Model, anchor: ir.Node) -> Match:
        if anchor.outputs[0].name != "y":
            raise Refusal("not the last product", anchor)
        ends = (model.graph.inputs[0], operand(anchor, 0)), {"epsilon": 1e-5}, (anchor.outputs[0],)
        return Match("rms_norm", RMS_NORM, anchor, *ends)

    rule = replace(rms_norm.RULE, match=careless)
    assert fuse(NORM, rule, weights=WEIGHT)[1]
    with pytest.raises(ProofError, match="RMSNorm does not compute what the graph computed before"):
        fuse(mutate(NORM, ("<value_ints = [-1]>", "<value_ints = [1]>")), rule, weights=WEIGHT)
