"""What is not finite shows: in the kernels and in the bodies, also where a type could not say that it was there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.ops.base import PluginOp
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8
from tests.kernels.quantized_matmul_cases import matrix
from tests.kernels.rolling_attention_cases import HALF, INT8, Case, inputs_of
from tests.support.kernels import Array, Node

NATIVE = pytest.mark.parametrize("native", [True, False], ids=["kernel", "body"])
TOKENS = pytest.mark.parametrize("tokens", [1, 3])


def _node(op: PluginOp, inputs: Any, outputs: Any, attributes: Any, *, native: bool) -> Node:
    functions = {f.identifier(): ir.to_proto(f) for f in op.functions(attributes)}
    return Node(op.name, inputs, outputs, attributes, native=native, functions=list(functions.values()))


def _attended(kind: str, tokens: int, native: bool, **change: Array) -> dict[str, Array]:
    """Of a step of one row; `change` replaces inputs. Angles are zero, so that keys are stored as they are."""
    case = Case(window=4, starts=(9,), steps=(), slots=8, tokens=tokens, heads=2, kv_heads=1)
    inputs = inputs_of(case, kind, np.random.default_rng(0))
    inputs["count"] = np.array([tokens])
    inputs["cos"], inputs["sin"] = np.ones_like(inputs["cos"]), np.zeros_like(inputs["sin"])
    inputs |= change
    outputs: dict[str, Any] = {"attended": np.float32, "present_key": kind, "present_value": kind}
    op, attributes = ROLLING_ATTENTION, dict(case.attributes)
    if kind == INT8:
        op = ROLLING_ATTENTION_INT8
        outputs |= {"present_key_scale": np.float32, "present_value_scale": np.float32}
    attributes |= {name: 0 for name in op.attributes if name not in attributes}
    return _node(op, inputs, outputs, attributes, native=native).run(inputs)


@NATIVE
@TOKENS
def test_a_key_that_float16_cannot_hold_shows_where_a_query_points_away_from_it(tokens: int, native: bool) -> None:
    """Its score would be minus infinity, its weight 0, and the result finite and wrong."""
    key = np.zeros((1, tokens, 1, 8), np.float32)
    query = np.ones((1, tokens, 2, 8), np.float32) * -1e-6
    assert np.isfinite(_attended(HALF, tokens, native, key=key, query=query)["attended"]).all()
    key[0, 0, 0, 3] = 7e4
    assert np.isnan(_attended(HALF, tokens, native, key=key, query=query)["attended"]).all()


@NATIVE
@TOKENS
@pytest.mark.parametrize("kind", [HALF, INT8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what", ["key", "value"])
def test_what_is_not_finite_is_stored_as_such(what: str, bad: float, kind: str, tokens: int, native: bool) -> None:
    new = np.ones((1, tokens, 1, 8), np.float32)
    new[0, 0, 0, 5] = bad
    change: dict[str, Array] = {what: new}
    outputs = _attended(kind, tokens, native, **change)
    shown = outputs["attended"] if what == "key" or kind == INT8 else outputs["attended"][..., 5]
    assert np.isnan(shown).all()
    ring = outputs[f"present_{what}_scale"] if kind == INT8 else outputs[f"present_{what}"][..., 5]
    np.testing.assert_array_equal(np.isnan(ring[0, 0]), np.arange(8) == 9 % 8)


@NATIVE
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_product_with_what_is_not_finite(bad: float, bits: int, native: bool) -> None:
    weight = matrix(17, 96, bits, 32, False, "float32")
    weight.inputs["scale"] = np.abs(np.asarray(weight.inputs["scale"])) + np.float32(1)
    node = _node(QUANTIZED_MATMUL, {"x": np.zeros((1, 1), np.float32), **weight.inputs}, {"y": np.float32},
                 weight.attributes, native=native)  # fmt: skip
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    x[1, 40] = bad
    y = node.run({"x": x, **weight.inputs})["y"]
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()
    assert node.run({"x": x[:0], **weight.inputs})["y"].shape == (0, 17)
