"""Each plugin op's function body, alone in a file and run by plain ONNX Runtime, against loops in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.ops import DOMAIN, OPS, OPSET
from graph_passes.ops.activations import ACTIVATIONS
from graph_passes.ops.base import declare
from graph_passes.ops.sliding_window_attention import visible_pairs
from tests.graph_passes import oracles
from tests.support.graphs import Arrays, check, run

_INTEGERS = {"start_B", "count_B", "expert_NK"}


@dataclass(frozen=True, slots=True)
class Case:
    """An op with its attributes and the static extents of its inputs, by letter; other extents are open."""

    op: str
    attributes: Mapping[str, int | float | str]
    extents: Mapping[str, int]

    def __str__(self) -> str:
        return "-".join([self.op, *(f"{k}{v}" for k, v in {**self.attributes, **self.extents}.items())])

    @property
    def shapes(self) -> list[tuple[int | str, ...]]:
        names = OPS[self.op].inputs
        if OPS[self.op].pointwise:  # any rank, one shape
            return [tuple(self.extents)] * len(names)
        return [tuple(self.extents.get(s, 1 if s == "1" else s) for s in name.rpartition("_")[2]) for name in names]


def _gqa(heads: int, groups: int, head_dim: int) -> Case:
    return Case("GroupedQueryAttention", {"scale": 0.4}, {"H": heads, "G": groups, "D": head_dim})


CASES = [
    *(Case("RotaryEmbedding", {"interleaved": i}, {"H": 3, "D": d, "d": d // 2}) for i in (0, 1) for d in (2, 6, 8)),
    *(Case("RollingKVWrite", {}, {"G": 2, "S": s, "D": 3}) for s in (1, 2, 3, 8)),
    Case("RollingKVWrite", {}, {"G": 1, "D": 4}),
    *(_gqa(*sizes) for sizes in ((4, 4, 8), (4, 2, 6), (4, 1, 8), (6, 3, 2))),
    *(Case("SlidingWindowAttention", {"scale": 0.6, "window": w}, {}) for w in (0, 1, 2, 3, 5, 8, 33)),
    *(Case("MoEGate", {"top_k": k}, {"E": e}) for e, k in ((4, 1), (4, 2), (8, 3), (8, 8), (1, 1))),
    *(Case("MixtureOfExperts", {"activation": name}, {"E": 4, "K": 2}) for name in sorted(ACTIVATIONS)),
    *(Case("MixtureOfExperts", {"activation": "silu"}, {"E": e, "K": k}) for e, k in ((1, 1), (4, 1), (4, 3), (8, 3))),
    *(Case("GatedActivation", {"activation": name}, {"N": 0, "I": 0}) for name in sorted(ACTIVATIONS)),
    Case("GatedActivation", {"activation": "silu"}, {"B": 0, "T": 0, "I": 0}),
]


@pytest.mark.parametrize("window", [0, 1, 5, 33])
def test_examples_of_the_window_have_rows_of_different_positions(window: int) -> None:
    """One row alone, or two alike, would not show a mask that takes one row's position for all."""
    op = OPS["SlidingWindowAttention"]
    examples = op.examples(np.random.default_rng(0), {"scale": 1.0, "window": window}, [()] * 5)
    starts = [arrays[3].tolist() for arrays in examples]
    assert all(len(pair) == 2 for pair in starts)
    assert sum(first != second for first, second in starts) > len(starts) // 2


def model_of(case: Case) -> ir.Model:
    """A model that is one node of the op, with its function body."""
    op = OPS[case.op]

    def value(name: str, shape: Sequence[int | str]) -> ir.Value:
        dtype = ir.DataType.INT64 if name in _INTEGERS else ir.DataType.FLOAT
        dtype = ir.DataType.BOOL if name.startswith("visible") else dtype
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    inputs = [value(name, shape) for name, shape in zip(op.inputs, case.shapes, strict=True)]
    axes = {name: case.shapes[0] if op.pointwise else name.rpartition("_")[2] for name in op.outputs}
    outputs = [value(name, [f"{name}_{axis}" for axis in axes[name]]) for name in op.outputs]
    node = op.node(inputs, case.attributes, outputs)
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": OPSET}, name="alone")
    model = ir.Model(graph, ir_version=11)
    declare(model, op.function(case.attributes))
    return model


def meaning(case: Case, feeds: Arrays) -> list[Any]:
    """What the op must give, by the oracles."""
    a, inputs = case.attributes, list(feeds.values())
    match case.op:
        case "RotaryEmbedding":
            return [oracles.rotary(*inputs, interleaved=int(a["interleaved"]))]
        case "RollingKVWrite":
            return [oracles.ring_write(*inputs)]
        case "GroupedQueryAttention":
            return [oracles.attention(*inputs, scale=float(a["scale"]))]
        case "SlidingWindowAttention":
            query, key, value, start, count = inputs
            visible = oracles.ring_mask(start, count, query.shape[2], key.shape[2], int(a["window"]))
            return [oracles.attention(query, key, value, visible, scale=float(a["scale"]))]
        case "MoEGate":
            return list(oracles.gate(*inputs, top_k=int(a["top_k"])))
        case "GatedActivation":
            return [oracles.gated(*inputs, activation=str(a["activation"]))]
        case _:
            return [oracles.experts(*inputs, activation=str(a["activation"]))]


def assert_op(case: Case, feeds: Arrays, outputs: Arrays) -> None:
    """The outputs are the meaning, except where the op leaves a query that sees nothing unspecified."""
    for (name, got), want in zip(outputs.items(), meaning(case, feeds), strict=True):
        assert got.shape == want.shape
        if got.dtype == np.int64:
            np.testing.assert_array_equal(got, want, err_msg=name)
        else:
            assert np.isfinite(got).all()
            specified = ~np.isnan(want)
            assert specified.any()
            np.testing.assert_allclose(got[specified], want[specified], rtol=2e-5, atol=2e-5, err_msg=name)


def test_every_op_has_cases() -> None:
    assert {case.op for case in CASES} == set(OPS)
    assert set(oracles.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_body_is_the_meaning(case: Case) -> None:
    model, op = model_of(case), OPS[case.op]
    check(model)
    examples = list(op.examples(np.random.default_rng(1), case.attributes, case.shapes))
    assert examples
    for arrays in examples:
        feeds = dict(zip(op.inputs, arrays, strict=True))
        assert_op(case, feeds, run(model, feeds))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_node_is_marked_for_plugin_lookup(case: Case) -> None:
    node = model_of(case).graph[0]
    assert (node.domain, node.op_type) == (DOMAIN, case.op)
    assert node.attributes["plugin_namespace"].as_string() == DOMAIN
    assert node.attributes["plugin_version"].as_string() == "1"
    assert {name: node.attributes[name].value for name in case.attributes} == pytest.approx(dict(case.attributes))


def test_ties_between_experts_go_to_the_lower_one() -> None:
    logits = np.array([[1, 1, 1, 1], [0, 2, 0, 2], [0, 1, 1, 0], [-5, -5, 3, -5]], np.float32)
    model = model_of(Case("MoEGate", {"top_k": 3}, {"E": 4}))
    outputs = run(model, {"logits_NE": logits})
    assert outputs["expert_NK"].tolist() == [[0, 1, 2], [1, 3, 0], [1, 2, 0], [2, 0, 1]]
    np.testing.assert_allclose(outputs["weight_NK"].sum(-1), 1, rtol=1e-6)


def test_experts_need_no_weights_that_sum_to_one() -> None:
    case = Case("MixtureOfExperts", {"activation": "gelu"}, {"E": 3, "K": 2})
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((5, 4), dtype=np.float32), 3 * rng.standard_normal((5, 2), dtype=np.float32)
    expert = np.array([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]], np.int64)
    gate, up = rng.standard_normal((2, 3, 6, 4), dtype=np.float32)
    down = rng.standard_normal((3, 4, 6), dtype=np.float32)
    feeds = dict(zip(OPS[case.op].inputs, (x, weight, expert, gate, up, down), strict=True))
    assert_op(case, feeds, run(model_of(case), feeds))


def test_an_expert_that_overflows_harms_only_the_tokens_that_chose_it() -> None:
    case = Case("MixtureOfExperts", {"activation": "relu2"}, {"E": 3, "K": 1})
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((4, 4), dtype=np.float32), np.ones((4, 1), np.float32)
    expert = np.array([[0], [1], [0], [1]], np.int64)
    gate, up = rng.standard_normal((2, 3, 6, 4), dtype=np.float32)
    down = rng.standard_normal((3, 4, 6), dtype=np.float32)
    gate[2] *= 1e25
    feeds = dict(zip(OPS[case.op].inputs, (x, weight, expert, gate, up, down), strict=True))
    assert_op(case, feeds, run(model_of(case), feeds))


@pytest.mark.parametrize("window", [0, 1, 2, 4])
def test_the_mask_definition_is_the_walk_over_the_ring(window: int) -> None:
    slots = 6
    start, count = (grid.ravel() for grid in np.meshgrid(np.arange(3 * slots), np.arange(4)))
    for tokens in (1, 3):
        got = visible_pairs(start, count, tokens, slots, window)
        np.testing.assert_array_equal(got, oracles.ring_mask(start, count, tokens, slots, window))


@pytest.mark.parametrize(
    ("window", "chunk", "slots"),
    [(1, 1, 1), (1, 4, 4), (2, 1, 2), (3, 3, 5), (5, 2, 6), (4, 9, 12), (5, 3, 16), (0, 4, 32)],
)
def test_ring_write_and_attention_are_windowed_attention_over_the_whole_text(
    window: int, chunk: int, slots: int
) -> None:
    """Two rows at different places, fed in uneven chunks past the third wrap, against attention without any ring."""
    rng = np.random.default_rng(3)
    length = slots if window == 0 else 3 * slots + 5
    query, key, value = (rng.standard_normal((2, heads, length, 4), dtype=np.float32) for heads in (4, 2, 2))
    distance = np.arange(length)[:, None] - np.arange(length)
    visible = (distance >= 0) & ((distance < window) | (window == 0))
    want = oracles.attention(query, key, value, np.broadcast_to(visible, (2, 1, length, length)), scale=0.5)
    write = model_of(Case("RollingKVWrite", {}, {}))
    attend = model_of(Case("SlidingWindowAttention", {"scale": 0.5, "window": window}, {}))
    rings = [np.full((2, 2, slots, 4), 7, np.float32) for _ in range(2)]  # what is never written must not be seen
    start = np.zeros(2, np.int64)
    while (start < length).any():
        count = np.minimum(rng.integers(0, chunk + 1, 2), length - start)
        fed = [np.zeros((2, heads, chunk, 4), np.float32) for heads in (4, 2, 2)]
        for row, (first, taken) in enumerate(zip(start.tolist(), count.tolist(), strict=True)):
            for part, whole in zip(fed, (query, key, value), strict=True):
                part[row, :, :taken] = whole[row, :, first : first + taken]
        rings = [
            run(write, {"ring_BGSD": ring, "new_BGTD": new, "start_B": start, "count_B": count})["rolled_BGSD"]
            for ring, new in zip(rings, fed[1:], strict=True)
        ]
        step: Arrays = {
            "query_BHTD": fed[0],
            "key_BGSD": rings[0],
            "value_BGSD": rings[1],
            "start_B": start,
            "count_B": count,
        }
        got = run(attend, step)["attended_BHTD"]
        for row, (first, taken) in enumerate(zip(start.tolist(), count.tolist(), strict=True)):
            np.testing.assert_allclose(got[row, :, :taken], want[row, :, first : first + taken], rtol=2e-5, atol=2e-5)
        start = start + count
