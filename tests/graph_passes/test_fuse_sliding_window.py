"""The window: masks are recognised by what they mean, whatever their spelling, and anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.fuse import gqa, sliding_window
from graph_passes.ops.sliding_window_attention import FULL
from tests.graph_passes.texts import ATTENTION, fuse, refusal
from tests.support.graphs import Arrays, assert_same_outputs, mutate, op_types, parse, statements

Spelling = list[tuple[str, str]]

NO_WINDOW = [("visible = And (seen, near)", "visible = Identity (seen)")]


def feeds(window: int) -> Arrays:
    """Rows from an empty ring to the third wrap, without padding: W − 1, W and W + 1 are among them."""
    rng = np.random.default_rng(0)
    tokens, slots = 3, max(window, 4) + 2
    full = {0, 1, slots - tokens} if window == FULL else set()
    starts = sorted(full or {0, 1, window - 1, window, window + 1, slots - 1, slots, 3 * slots + 1})
    rows = len(starts)
    key, value = rng.standard_normal((2, rows, 2, slots, 6), dtype=np.float32)
    return {
        "query": 2 * rng.standard_normal((rows, 4, tokens, 6), dtype=np.float32),
        "key": key,
        "value": value,
        "start": np.array(starts, np.int64),
        "count": np.full(rows, tokens, np.int64),
    }


@pytest.mark.parametrize(
    ("spelling", "window"),
    [
        ([], 5),
        *(([("<value_int = 5>", f"<value_int = {w}>")], w) for w in (1, 2, 3, 63, 64, 65, 700, 4096)),
        ([("near = Less", "near = LessOrEqual")], 6),
        ([("near = Less (distance, window)", "far = GreaterOrEqual (distance, window) near = Not (far)")], 5),
        ([("near = Less (distance, window)", "edge = Add (key_at, window) near = Greater (edge, query_at)")], 5),
        ([("causal = LessOrEqual (key_at, query_at)", "causal = GreaterOrEqual (query_at, key_at)")], 5),
        ([("written = GreaterOrEqual (key_at, zero)", "minus = Sub (zero, one) written = Greater (key_at, minus)")], 5),
        (
            [
                (
                    "age = Mod (behind, slots_1)",
                    "turns = Div (behind, slots) e = Mul (turns, slots) "
                    "rest = Sub (behind, e) fixed = Add (rest, slots) age = Mod (fixed, slots)",
                )
            ],
            5,
        ),
        (NO_WINDOW, FULL),
    ],
)
def test_fuses(spelling: Spelling, window: int) -> None:
    text = mutate(ATTENTION, *spelling)
    model, (_, record) = fuse(text, gqa.RULE, sliding_window.RULE)
    assert statements(model) == ["attended = cierzo.SlidingWindowAttention(query, key, value, start, count)"]
    assert record.attributes == {"scale": pytest.approx(0.4), "window": window}
    assert record.error == 0.0
    assert [function.name for function in model.functions.values()] == ["SlidingWindowAttention"]
    assert_same_outputs(parse(text), model, feeds(window))


def test_start_and_count_are_told_apart_by_their_meaning() -> None:
    """The same mask with the roles of the two inputs exchanged."""
    text = mutate(
        ATTENTION,
        ("Unsqueeze (start, axis_1)", "Unsqueeze (count, axis_1)"),
        ("count_B1 = Unsqueeze (count", "count_B1 = Unsqueeze (start"),
    )
    model, _ = fuse(text, gqa.RULE, sliding_window.RULE)
    assert statements(model) == ["attended = cierzo.SlidingWindowAttention(query, key, value, count, start)"]


def test_a_mask_that_two_attentions_share_goes_with_the_second() -> None:
    text = mutate(
        ATTENTION,
        ("=> (float[B,4,T,6] attended)", "=> (float[B,4,T,6] again)"),
        (
            "attended = MatMul (weights, value_heads)",
            """attended = MatMul (weights, value_heads)
            product_2 = MatMul (attended, key_t)
            scores_2 = Mul (product_2, scale)
            masked_2 = Where (visible, scores_2, lowest)
            weights_2 = Softmax <axis = -1> (masked_2)
            again = MatMul (weights_2, value_heads)""",
        ),
    )
    model, records = fuse(text, gqa.RULE, sliding_window.RULE)
    assert op_types(model) == ["SlidingWindowAttention"] * 2
    assert [record.attributes.get("window") for record in records] == [None, None, 5, 5]
    assert_same_outputs(parse(text), model, feeds(5))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            [("int64[B] start", "bool[B,1,T,S] given, int64[B] start"), ("Where (visible", "Where (given")],
            "the mask should depend on two int64 [B] values, but depends on 'given'",
        ),
        (
            [
                ("int64[B] start", "int64[B] reach, int64[B] start"),
                ("Less (distance, window)", "Less (distance, reach_4)"),
                (
                    "near =",
                    "axes_123 = Constant <value_ints = [1, 2, 3]> () reach_4 = Unsqueeze (reach, axes_123) near =",
                ),
            ],
            "depends on 'start', 'count', 'reach'",
        ),
        (
            [
                ("int64[B] start", "int32[B] start"),
                ("Unsqueeze (start,", "Unsqueeze (start_long,"),
                ("start_B1 =", "start_long = Cast <to = 7> (start) start_B1 ="),
            ],
            "the mask should depend on two int64 [B] values, but depends on 'start', 'count'",
        ),
        ([("causal = LessOrEqual", "causal = Less")], "does not see slot"),
        ([("visible = And (seen, near)", "visible = And (written, near)")], "sees slot"),
        ([("visible = And (seen, near)", "visible = And (causal, near)")], "sees slot"),
        ([("visible = And (seen, near)", "visible = Or (seen, near)")], "sees slot"),
        (
            [("last = Sub (end, one)", "last = Identity (end)")],
            "the mask is no causal window over a ring (read as start=",
        ),
        ([("Mod (behind, slots_1)", "Mod (behind, window)")], "the mask is no causal window over a ring"),
        (
            [
                (
                    "near = Less (distance, window)",
                    "q = Div (query_at, window) k = Div (key_at, window) near = Equal (q, k)",
                )
            ],
            "the mask is no causal window over a ring",  # blocks of five, not the last five
        ),
        (
            [
                (
                    "near = Less (distance, window)",
                    "close = Less (distance, window) first = Equal (key_at, zero) near = Or (close, first)",
                )
            ],
            "token 0 sees slot 0",  # an attention sink
        ),
        (
            [
                (
                    "near = Less (distance, window)",
                    "close = Less (distance, window) second = Equal (distance, one) "
                    "other = Not (second) near = And (close, other)",
                )
            ],
            "does not see slot",  # a hole in the window
        ),
        (
            [
                (
                    "near = Less (distance, window)",
                    "d = Cast <to = 1> (query_at) k = Cast <to = 1> (key_at) e = Sub (d, k) "
                    "w = Cast <to = 1> (window) near = Less (e, w)",
                )
            ],
            "with start 2147483653",  # positions in float32 are off past 2^24
        ),
        (
            [
                ("Range (zero, tokens, one)", "Range (zero, some, one)"),
                ("offset =", "some_1 = Shape (count) some = Squeeze (some_1) offset ="),
            ],
            "for T = 1, S = 5",
        ),
        (
            [
                (
                    "visible = And (seen, near)",
                    "ones = Constant <value_ints = [1, 1, 1, 1, 1, 1, 1]> () odd = Unsqueeze (ones, axis_1) "
                    "sum = Add (held, ones) most = ReduceMax <keepdims = 0> (sum) fine = GreaterOrEqual (most, zero) "
                    "also = And (seen, fine) visible = And (also, near)",
                )
            ],
            "the region cannot run on these inputs",
        ),
        (
            [
                ("int64[B] start", "int64 reach, int64[B] start"),
                (
                    "visible = And (seen, near)",
                    "newest = ReduceMax <keepdims = 0> (end) late = Greater (newest, window) "
                    "inside = If (late) <then_branch = a () => (bool[B,1,T,S] c) { c = Less (distance, reach) }, "
                    "else_branch = b () => (bool[B,1,T,S] d) { d = Identity (near) }> visible = And (seen, inside)",
                ),
            ],
            "the region holds a node (such as If) whose own graph reads values from outside",
        ),
    ],
)
def test_refuses(fault: Spelling, reason: str) -> None:
    assert reason in refusal(mutate(ATTENTION, *fault), sliding_window.RULE, gqa.RULE)
