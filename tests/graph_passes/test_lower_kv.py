"""KV rings in other types: what the graph's ends become, and what is computed then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes import pipeline
from graph_passes.driver import apply
from graph_passes.fuse import rolling_attention
from graph_passes.lower.kv import lower_kv, scale_ring
from graph_passes.lower.rounding import allow_rounding
from runtime.errors import FusionError
from tests.graph_passes import oracles
from tests.graph_passes.conftest import Template
from tests.graph_passes.layer_texts import BEFORE, ROLLING, RULES
from tests.graph_passes.texts import fuse
from tests.support.graphs import Arrays, check, mutate, op_types, run, serialised

FLOAT, HALF, BYTE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
ENDS = {
    f"{which}_{what}": f"{which}.0.{what}" for which in ("past", "present") for what in ("key", "value")
}  # fmt: skip


def layer(text: str = ROLLING) -> ir.Model:
    """One layer's attention, fused, with rings named as in a bundle."""
    model, _ = fuse(text, *RULES)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = ENDS.get(str(value.name), value.name)
    return model


def types(values: Sequence[ir.Value]) -> dict[str, tuple[ir.DataType | None, int]]:
    return {str(value.name): (value.dtype, len(value.shape or ())) for value in values}


def feeds(dtype: str) -> Arrays:
    """Multiples of 1/16, whose products and sums are exact in float32: what is stored of them is then one number.

    Rows at the beginning, at the window's edge, and past the third wrap, the last one with padding; window 5, T = 3.
    """
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return (np.round(rng.standard_normal((5, *shape)) * 16) / 16).astype(np.float32)

    rings: Arrays = {f"past.0.{what}": numbers(2, 7, 6) for what in ("key", "value")}
    if dtype == "float16":
        rings = {name: ring.astype(np.float16) for name, ring in rings.items()}
    if dtype == "int8":
        scales = {scale_ring(name): rng.random((5, 2, 7), dtype=np.float32) / 64 for name in rings}
        rings = {name: rng.integers(-127, 128, (5, 2, 7, 6), dtype=np.int8) for name in rings} | scales
    return {
        "query": numbers(3, 4, 6),
        "key": numbers(3, 2, 6),
        "value": numbers(3, 2, 6),
        "cos": numbers(3, 3),
        "sin": numbers(3, 3),
        **rings,
        "start": np.array([0, 3, 5, 6, 24], np.int64),
        "count": np.array([3, 3, 3, 3, 2], np.int64),
    }


def test_float32_is_left_as_it_is() -> None:
    model = layer()
    before = serialised(model)
    lower_kv(model, "float32")
    assert serialised(model) == before


def test_float16_is_the_same_node_with_other_ends() -> None:
    model = layer()
    inputs, outputs = list(types(model.graph.inputs)), list(types(model.graph.outputs))
    lower_kv(model, "float16")
    check(model)
    assert op_types(model) == ["RollingAttention"]
    assert (list(types(model.graph.inputs)), list(types(model.graph.outputs))) == (inputs, outputs)
    ends = types([*model.graph.inputs, *model.graph.outputs])
    assert {name for name, (dtype, _) in ends.items() if dtype == HALF} == set(ENDS.values())


def test_int8_has_a_ring_of_scales_beside_each() -> None:
    model = layer()
    lower_kv(model, "int8")
    check(model)
    node = model.graph[0]
    assert op_types(model) == ["RollingAttentionInt8"]
    rings = ["past.0.key", "past.0.value", "past.0.key.scale", "past.0.value.scale"]
    assert [str(v.name) for v in model.graph.inputs][5:] == [*rings, "start", "count"]
    assert [v.name for v in node.inputs if v is not None] == [v.name for v in model.graph.inputs]
    assert list(types(model.graph.outputs)) == ["attended", *(name.replace("past", "present") for name in rings)]
    assert list(node.outputs) == list(model.graph.outputs)
    ends = types([*model.graph.inputs, *model.graph.outputs])
    for name in ENDS.values():
        assert ends[name] == (BYTE, 4)
        assert ends[scale_ring(name)] == (FLOAT, 3)
    assert {f.name for f in model.functions.values()} == {
        "RotaryEmbedding",
        "RollingKVWrite",
        "SlidingWindowAttention",
        "RollingAttentionInt8",
    }


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_stored_is_the_definition_and_what_is_attended_to_is_what_is_stored(dtype: str) -> None:
    model = layer()
    lower_kv(model, dtype)
    given = feeds(dtype)
    got = list(run(model, given).values())
    rings = [array for name, array in given.items() if name.startswith("past")]
    new = [given[name] for name in ("query", "key", "value", "cos", "sin")]
    want = oracles.rolling_attention(
        new, rings, given["start"], given["count"], scale=float(np.float32(0.4)), window=5, interleaved=0
    )
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=2e-5)
    for ring, due in zip(got[1:], want[1:], strict=True):
        assert ring.dtype == due.dtype
        np.testing.assert_array_equal(ring, due)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_layer_of_a_whole_model_has_its_rings(dense: Template, dtype: str) -> None:
    model = dense.model()
    pipeline.run(model, dense.expected, proving=False)
    before = [str(value.name) for value in model.graph.inputs]
    lower_kv(model, dtype)
    due: list[str] = []
    for name in before:
        due.append(name)
        if dtype == "int8" and name.endswith(".value"):
            due += [scale_ring(name.replace("value", "key")), scale_ring(name)]
    assert [str(value.name) for value in model.graph.inputs] == due
    outputs = [str(value.name) for value in model.graph.outputs]
    assert outputs == ["logits", *(name.replace("past", "present") for name in due if name.startswith("past"))]
    windows = [n.attributes["window"].as_int() for n in model.graph if n.op_type.startswith("RollingAttention")]
    assert windows == [5, 0]


def test_a_ring_that_another_node_reads_is_refused() -> None:
    text = mutate(
        ROLLING,
        ("float[B,2,S,6] present_value)", "float[B,2,S,6] present_value, float[B,2,S,6] low)"),
        ("attended = Transpose", "low = Neg (present_key) attended = Transpose"),
    )
    for dtype in ("float16", "int8"):
        model = layer(text)
        untouched = serialised(model)
        with pytest.raises(FusionError, match=r"The ring present\.0\.key is read or written by Neg .* --kv float32"):
            lower_kv(model, dtype)
        assert serialised(model) == untouched


def test_a_ring_that_is_not_written_by_rolling_attention_is_refused() -> None:
    """A graph whose last rule has not fired."""
    model, _ = fuse(ROLLING, *BEFORE)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = ENDS.get(str(value.name), value.name)
    with pytest.raises(FusionError, match=r"The ring past\.0\.key is read or written by RollingKVWrite"):
        lower_kv(model, "int8")
    assert apply(model, rolling_attention.RULE)[0]
    lower_kv(model, "int8")
    assert op_types(model) == ["RollingAttentionInt8"]


def test_who_asks_a_ring_for_its_size_may_go_on() -> None:
    text = mutate(
        ROLLING,
        ("float[B,2,S,6] present_value)", "float[B,2,S,6] present_value, int64[1] slots)"),
        ("attended = Transpose", "slots = Shape <start = 2, end = 3> (past_key) attended = Transpose"),
    )
    model = layer(text)
    lower_kv(model, "int8")
    given = feeds("int8")
    assert run(model, given)["slots"].tolist() == [7]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rounding_is_allowed_on_every_attention_and_the_body_does_not_round(dtype: str) -> None:
    model = layer()
    lower_kv(model, dtype)
    before = run(model, feeds(dtype))
    assert model.graph[0].attributes["rounds"].as_int() == 0
    allow_rounding(model)
    check(model)
    assert model.graph[0].attributes["rounds"].as_int() == 1
    for name, array in run(model, feeds(dtype)).items():
        np.testing.assert_array_equal(array, before[name])
