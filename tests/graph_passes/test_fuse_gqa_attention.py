"""ONNX Attention as the anchor, and masks that are added: what fuses, and why the others do not."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.fuse import gqa
from tests.graph_passes.texts import fuse, refusal
from tests.support.graphs import assert_same_outputs, mutate, parse, statements

ATTENTION = """g (float[B,4,T,6] query, float[B,2,S,6] key, float[B,2,S,6] value, bool[B,1,T,S] visible)
    => (float[B,4,T,6] attended) <float[B,1,T,S] mask>
{
    low = Constant <value_float = -1.0e9> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    mask = Where (visible, zero, low)
    attended = Attention <scale = 0.4> (query, key, value, mask)
}"""

TWO = "bool[B,1,T,S] visible, bool[B,1,T,S] other"


def feeds(other: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "query": 2 * rng.standard_normal((2, 4, 3, 6), dtype=np.float32),
        "key": rng.standard_normal((2, 2, 7, 6), dtype=np.float32),
        "value": rng.standard_normal((2, 2, 7, 6), dtype=np.float32),
        "visible": rng.random((2, 1, 3, 7)) < 0.7,
    }
    if other:
        arrays["other"] = rng.random((2, 1, 3, 7)) < 0.7
        arrays["other"][..., 0] = True
    arrays["visible"][..., 0] = True
    return arrays


@pytest.mark.parametrize(
    ("spelling", "statement"),
    [
        ([], "cierzo.GroupedQueryAttention(query, key, value, visible)"),
        (
            [("key, value, mask)", "key, value, visible)")],
            "cierzo.GroupedQueryAttention(query, key, value, visible)",
        ),
        ([("(visible, zero, low)", "(visible, low, zero)")], "Not(visible)"),
        (
            [("mask = Where (visible, zero, low)", "flag = Cast <to = 1> (visible) mask = Log (flag)")],
            "cierzo.GroupedQueryAttention(query, key, value, visible)",
        ),
    ],
)
def test_fuses(spelling: list[tuple[str, str]], statement: str) -> None:
    text = mutate(ATTENTION, *spelling)
    model, (record,) = fuse(text, gqa.RULE)
    assert any(line.endswith(f"= {statement}") for line in statements(model)), statements(model)
    assert record.attributes == {"scale": pytest.approx(0.4)}
    arrays = feeds()
    if statement.startswith("Not"):
        arrays["visible"][..., 1] = False
    assert_same_outputs(parse(text), model, arrays)


def test_a_mask_of_two_bools_is_made_bool_itself() -> None:
    text = mutate(
        ATTENTION,
        ("bool[B,1,T,S] visible", TWO),
        (
            "mask = Where (visible, zero, low)",
            "a = Where (visible, zero, low) b = Where (other, zero, low) mask = Add (a, b)",
        ),
    )
    model, _ = fuse(text, gqa.RULE)
    assert [node.op_type for node in model.graph][-3:] == ["Cast", "Not", "GroupedQueryAttention"]
    assert_same_outputs(parse(text), model, feeds(other=True))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            [("Attention <scale = 0.4>", "Attention <scale = 0.4, softcap = 30.0>")],
            "caps its scores (soft-capping, 30)",
        ),
        ([("Attention <scale = 0.4>", "Attention <scale = 0.4, is_causal = 1>")], "causal by the order of its keys"),
        ([("key, value, mask)", "key, value)")], "the scores are not masked"),
        (
            [
                ("bool[B,1,T,S] visible)", "bool[B,1,T,S] visible, float[B,2,P,6] old)"),
                ("attended = Attention", "attended, k, v = Attention"),
                ("key, value, mask)", "key, value, mask, old, old)"),
            ],
            "keeps keys and values of its own",
        ),
        (
            [
                (
                    "float[B,4,T,6] query, float[B,2,S,6] key, float[B,2,S,6] value",
                    "float[B,T,24] query, float[B,S,12] key, float[B,S,12] value",
                ),
                ("=> (float[B,4,T,6] attended)", "=> (float[B,T,24] attended)"),
                ("<scale = 0.4>", "<scale = 0.4, q_num_heads = 4, kv_num_heads = 2>"),
            ],
            "heads side by side",
        ),
        (
            [
                ("query, float[B,2,S,6] key, float[B,2,S,6] value", "query, float[B,2,S,D] key, float[B,2,S,D] value"),
                ("float[B,4,T,6] query", "float[B,4,T,D] query"),
                ("(float[B,4,T,6] attended)", "(float[B,4,T,D] attended)"),
                ("Attention <scale = 0.4>", "Attention"),
            ],
            "a head dim that is not fixed",
        ),
        ([("scale = 0.4", "scale = 0.4, softmax_precision = 10")], "rounded to a narrower type"),
        ([("(visible, zero, low)", "(visible, zero, zero)")], "hides everything or nothing"),
        ([("(visible, zero, low)", "(visible, low, low)")], "hides everything or nothing"),
        ([("(visible, zero, low)", "(visible, one, low)")], "masked scores are 1, which leaves them some weight"),
        ([("-1.0e9", "-9.9e8")], "masked scores are -9.9e+08, which leaves them some weight"),
        (
            [
                ("bool[B,1,T,S] visible", TWO),
                (
                    "mask = Where (visible, zero, low)",
                    "bias = Where (other, zero, one) both = Where (visible, bias, low) mask = Identity (both)",
                ),
            ],
            "masked scores are 1, which leaves them some weight",  # zero and low, and one that is neither
        ),
        (
            [
                (
                    "bool[B,1,T,S] visible)",
                    "bool[B,1,T,S] visible, bool[B,1,T,S] b, bool[B,1,T,S] c, bool[B,1,T,S] d, bool[B,1,T,S] e)",
                ),
                (
                    "mask = Where (visible, zero, low)",
                    "m = Where (b, zero, low) n = Where (c, m, low) o = Where (d, n, low) p = Where (e, o, low) "
                    "mask = Where (visible, p, low)",
                ),
            ],
            "made of 5 bool values",
        ),
        (
            [
                (
                    "mask = Where",
                    "tall = Sqrt (key) sums = ReduceMax <keepdims = 0> (tall) soft = Mul (low, sums) mask = Where",
                ),
                ("(visible, zero, low)", "(visible, zero, soft)"),
            ],
            "computed from 'sums' (by ReduceMax): a bias",
        ),
    ],
)
def test_refuses(fault: list[tuple[str, str]], reason: str) -> None:
    assert reason in refusal(mutate(ATTENTION, *fault), gqa.RULE)
