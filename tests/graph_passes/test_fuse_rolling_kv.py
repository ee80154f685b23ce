"""Ring write: which scatters become a RollingKVWrite node, and why the others do not."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.driver import apply
from graph_passes.fuse import rolling_kv
from runtime.errors import ProofError
from tests.graph_passes.texts import RING, fuse, refusal
from tests.support.graphs import Arrays, assert_same_outputs, canonical, mutate, parse, serialised, statements


def feeds() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "ring": rng.standard_normal((5, 2, 7, 6), dtype=np.float32),
        "new": rng.standard_normal((5, 2, 4, 6), dtype=np.float32),
        "start": np.array([0, 3, 6, 25, 2**31 + 3], np.int64),
        "count": np.array([4, 4, 3, 1, 0], np.int64),
    }


@pytest.mark.parametrize(
    "spelling",
    [
        [],
        [("rolled = ScatterElements <axis = 2>", 'rolled = ScatterElements <axis = -2, reduction = "none">')],
        [("Less (offset, count_B1)", "Greater (count_B1, offset)")],
        [("Add (start_B1, offset)", "Add (offset, start_B1)")],
    ],
)
def test_fuses(spelling: list[tuple[str, str]]) -> None:
    text = mutate(RING, *spelling)
    model, (record,) = fuse(text, rolling_kv.RULE)
    assert statements(model) == ["rolled = cierzo.RollingKVWrite(ring, new, start, count)"]
    assert (record.rule, record.op, record.attributes, record.error) == ("rolling_kv", "RollingKVWrite", {}, 0.0)
    assert_same_outputs(parse(text), model, feeds())


SMALL_RING = [
    ("float[B,2,S,6] ring", "float[B,2,S] ring"),
    ("float[B,2,T,6] new", "float[B,2,T] new"),
    ("float[B,2,S,6] rolled", "float[B,2,S] rolled"),
    ("axes = Constant <value_ints = [1, 3]>", "axes = Constant <value_ints = [1]>"),
]
OTHER = ("int64[B] start", "int64[B] start, int64[B] other, float[B,2,S,6] other_ring")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            [("rolled = ScatterElements <axis = 2>", "rolled = ScatterElements <axis = 3>")],
            "not a scatter over the slot axis",
        ),
        (SMALL_RING, "not a scatter over the slot axis of a [B, G, S, D] buffer"),
        (
            [("rolled = ScatterElements <axis = 2>", 'rolled = ScatterElements <axis = 2, reduction = "add">')],
            "the scatter reduces (add) instead of replacing",
        ),
        ([("index, update)", "index, new)")], "'new' should come from Where, but comes from a graph input or weight"),
        ([("new, kept)", "new, new)")], "'new' should come from GatherElements"),
        ([OTHER, ("> (ring, index)", "> (other_ring, index)")], "padding is not given back what its own slot holds"),
        ([("kept = GatherElements <axis = 2>", "kept = GatherElements <axis = 3>")], "padding is not given back"),
        (
            [("kept =", "elsewhere = Neg (index) kept ="), ("> (ring, index)", "> (ring, elsewhere)")],
            "padding is not given back what its own slot holds",
        ),
        ([("Unsqueeze (count, axis_1)", "Unsqueeze (start, axis_1)")], "slots and padding mask both depend on 'start'"),
        (
            [
                OTHER,
                (
                    "position = Add (start_B1, offset)",
                    "o = Unsqueeze (other, axis_1) p = Add (o, start_B1) position = Add (p, offset)",
                ),
            ],
            "the slots should depend on one int64 [B] value, but depend on 'other', 'start'",
        ),
        (
            [
                OTHER,
                ("Less (offset, count_B1)", "Less (offset, limit)"),
                ("valid =", "o = Unsqueeze (other, axis_1) limit = Min (o, count_B1) valid ="),
            ],
            "the padding mask should depend on one int64 [B] value, but depend on 'other', 'count'",
        ),
        (
            [
                ("int64[B] start", "int32[B] start"),
                ("Unsqueeze (start,", "Unsqueeze (start_long,"),
                ("slots = ", "start_long = Cast <to = 7> (start) slots = "),
            ],
            "the slots should depend on one int64 [B] value, but depend on 'start'",
        ),
        (
            [
                ("Unsqueeze (start, axis_1)", "Unsqueeze (zeros, axis_1)"),
                ("start_B1 =", "zeros = Constant <value_ints = [3]> () start_B1 ="),
            ],
            "the slots should depend on one int64 [B] value, but depend on nothing",
        ),
        (
            [
                ("float[B,2,T,6] new", "float[2,T,6] new"),
                ("Shape <start = 2, end = 3> (new)", "Shape <start = 1, end = 2> (new)"),
            ],
            "'new' has 3 axes where new_BGTD is needed",
        ),
        ([("float[B,2,T,6] new", "float[B,1,T,6] new")], "G is 1 in 'new' (new_BGTD) and 2 elsewhere"),
    ],
)
def test_refuses(fault: list[tuple[str, str]], reason: str) -> None:
    assert reason in refusal(mutate(RING, *fault), rolling_kv.RULE)


@pytest.mark.parametrize(
    "fault",
    [
        [
            ("Mod (position, slots)", "Mod (position, seven)"),
            ("slot =", "seven = Constant <value_ints = [7]> () slot ="),
        ],
        [("Mod (position, slots)", "Mod (next, slots)"), ("slot =", "next = Add (position, one) slot =")],
        [("valid = Less", "valid = LessOrEqual")],
        [("valid = Less", "valid = GreaterOrEqual")],
        [
            ("Range (zero, tokens, one)", "Range (zero, tokens, one) ones = Sign (offset)"),
            ("(start_B1, offset)", "(start_B1, ones)"),
        ],
        [
            ("Mod (position, slots)", "Mod (narrow, slots)"),
            ("slot =", "n = Cast <to = 1> (position) narrow = Cast <to = 7> (n) slot ="),
        ],
    ],
    ids=["modulo a constant", "one slot on", "one token more", "padding only", "one slot for all", "float positions"],
)
def test_a_look_alike_is_caught_by_the_proof(fault: list[tuple[str, str]]) -> None:
    text = mutate(RING, *fault)
    model = canonical(text)
    untouched = serialised(model)
    with pytest.raises(ProofError, match="RollingKVWrite does not compute what the graph computed before"):
        apply(model, rolling_kv.RULE)
    assert serialised(model) == untouched
