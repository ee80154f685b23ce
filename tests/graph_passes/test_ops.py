"""Each plugin op's function body, alone in a file and run by plain ONNX Runtime, against loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graph_passes.ops import DOMAIN, OPS
from graph_passes.ops.activations import ACTIVATIONS
from graph_passes.ops.sliding_window_attention import visible_pairs
from tests.graph_passes import oracles
from tests.graph_passes.op_cases import CASES, Case, examples_of, model_of
from tests.support.graphs import Arrays, check, run

_EXACT = {"present_key_BGSD", "present_value_BGSD", "present_key_scale_BGS", "present_value_scale_BGS"}
"""Outputs that are stored numbers: nothing may be off, be it by one rounding."""


@pytest.mark.parametrize("window", [0, 1, 5, 33])
def test_examples_of_the_window_have_rows_of_different_positions(window: int) -> None:
    """One row alone, or two alike, would not show a mask that takes one row's position for all."""
    op = OPS["SlidingWindowAttention"]
    examples = op.examples(np.random.default_rng(0), {"scale": 1.0, "window": window}, [()] * 5)
    starts = [arrays[3].tolist() for arrays in examples]
    assert all(len(pair) == 2 for pair in starts)
    assert sum(first != second for first, second in starts) > len(starts) // 2


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
        case "RollingAttention" | "RollingAttentionInt8" | "PackedRollingAttention":
            *new, start, count = inputs
            if case.op == "PackedRollingAttention":
                H, G = int(a["heads"]), int(a["kv_heads"])
                new[:1] = np.split(new[0], [H, H + G], axis=2)
            scale, window, interleaved = float(a["scale"]), int(a["window"]), int(a["interleaved"])
            return oracles.rolling_attention(
                new[:5], new[5:], start, count, scale=scale, window=window, interleaved=interleaved
            )
        case "MoEGate":
            return list(oracles.gate(*inputs, top_k=int(a["top_k"])))
        case "GatedActivation":
            return [oracles.gated(*inputs, activation=str(a["activation"]))]
        case "RMSNorm":
            return [oracles.rms_norm(*inputs, epsilon=float(np.float32(a["epsilon"])))]
        case "StoredMatMul":
            return [oracles.product(*inputs)]
        case "QuantizedMatMul":
            x, packed, scales, *zero = inputs
            given = zero[0] if zero else None
            weight = oracles.dequantized(packed, scales, given, K=int(a["K"]), bits=int(a["bits"]))
            return [oracles.product(x, weight)]
        case "QuantizedMixtureOfExperts":
            x, weight, expert, *_ = inputs
            return [oracles.experts(x, weight, expert, *_matrices(case, inputs[3:]), activation=str(a["activation"]))]
        case _:
            return [oracles.experts(*inputs, activation=str(a["activation"]))]


def _matrices(case: Case, stacks: list[Any]) -> list[Any]:
    """Gate, up and down of quantised experts in float64."""
    a = case.attributes
    sizes = (int(a["hidden"]), int(a["hidden"]), int(a["intermediate"]))
    numbers = stacks[:6]
    zeros = stacks[6:] or [None] * 3
    return [
        oracles.dequantized(packed, scale, zero, K=K, bits=int(a["bits"]))
        for packed, scale, zero, K in zip(numbers[::2], numbers[1::2], zeros, sizes, strict=True)
    ]


def allowance(case: Case, feeds: Arrays) -> Any:
    """What the op leaves to its implementations: the gated numbers of a block may be rounded to 8 bits."""
    if case.op != "QuantizedMixtureOfExperts":
        return 0.0
    x, weight, expert, *stacks = feeds.values()
    a, matrices = case.attributes, _matrices(case, stacks)
    return oracles.gated_rounding(
        x, weight, expert, *matrices, activation=str(a["activation"]), block=int(a["block_size"])
    )


def assert_op(case: Case, feeds: Arrays, outputs: Arrays) -> None:
    """The outputs are the meaning, except where the op leaves a query that sees nothing unspecified."""
    for (name, got), want in zip(outputs.items(), meaning(case, feeds), strict=True):
        assert got.shape == want.shape
        if got.dtype == np.int64 or (name in _EXACT and case.types):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want, err_msg=name)
        else:
            assert np.isfinite(got).all()
            specified = ~np.isnan(want)
            assert specified.any()
            room = np.broadcast_to(2e-5 + 2e-5 * np.abs(want) + allowance(case, feeds), want.shape)
            assert (np.abs(got - want)[specified] <= room[specified]).all(), name


def test_every_op_has_cases() -> None:
    assert {case.op for case in CASES} == set(OPS)
    assert set(oracles.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_body_is_the_meaning(case: Case) -> None:
    model = model_of(case)
    check(model)
    examples = list(examples_of(case))
    assert examples
    for feeds in examples:
        assert_op(case, feeds, run(model, feeds))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_node_is_marked_for_plugin_lookup(case: Case) -> None:
    node = model_of(case).graph[-1]
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


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "QuantizedMatMul"], ids=str)
@pytest.mark.parametrize("fault", [np.inf, -np.inf, np.nan])
def test_a_row_that_is_not_finite_shows_behind_a_quantised_product(case: Case, fault: float) -> None:
    """Activations are rounded to 8 bits, of which none is infinite; other rows are as they were."""
    *_, feeds = examples_of(case)
    model, name = model_of(case), case.inputs[0]
    right = run(model, feeds)["y_N"]
    feeds[name][1, 0, -1] = fault
    got = run(model, feeds)["y_N"]
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(right, 1, 0))


@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("case", [c for c in CASES if c.op.startswith("RollingAttention") and c.types], ids=str)
def test_what_a_ring_cannot_hold_shows_in_what_is_attended_to(case: Case, what: str) -> None:
    """An infinite key would have no weight, and an integer is always finite: both are marked, and in no other row."""
    *_, feeds = examples_of(case)
    model = model_of(case)
    right = run(model, feeds)
    feeds[f"{what}_BTGD"][0, 0, 0, 0] = 1e5 if case.op == "RollingAttention" else np.inf
    got = run(model, feeds)
    assert np.isnan(got["attended_BTHD"][0, 0]).any()
    for name, array in got.items():
        np.testing.assert_array_equal(array[1], right[name][1])


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
