"""RollingAttention's kernel at every level of instructions, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.kernels import counters
from tests.kernels.rolling_attention_cases import FLOAT, HALF, INT8, KINDS, Case, inputs_of, node_of
from tests.support.kernels import Array, levels, run_cases

STEP = Case(window=4, starts=(9, 2), steps=(), slots=6, tokens=3)


@pytest.mark.parametrize("level", levels())
def test_all_cases(level: str) -> None:
    assert run_cases("rolling_attention_cases", level).startswith(level)


def _bytes_read() -> int:
    return sum(counter.bytes for counter in counters() if counter.op.startswith("RollingAttention"))


@pytest.mark.parametrize(("kind", "bytes_of_slot"), [(FLOAT, 2 * 8 * 4), (HALF, 2 * 8 * 2), (INT8, 2 * 8 + 2 * 4)])
def test_only_visible_slots_are_read(kind: str, bytes_of_slot: int) -> None:
    """Counted for each KV head: 4 − 1 + 2 slots for the row far on, 2 + 3 for the one that has just begun."""
    inputs = inputs_of(STEP, kind, np.random.default_rng(0))
    inputs["count"] = np.array([2, 3])
    before = _bytes_read()
    node_of(STEP, kind, inputs).run(inputs)
    assert _bytes_read() - before == (5 + 5) * STEP.kv_heads * bytes_of_slot


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_no_token_sees_is_not_touched(kind: str, tokens: int) -> None:
    """Slots outside every window may hold anything, even what is not a number."""
    case = replace(STEP, starts=(9,), slots=32, tokens=tokens)
    inputs = inputs_of(case, kind, np.random.default_rng(1))
    inputs["count"] = np.array([tokens])
    node = node_of(case, kind, inputs)
    plain = node.run(inputs)["attended"]
    spoilt: dict[str, Array | None] = {}
    for name, array in inputs.items():
        spoilt[name] = array
        if array is not None and name.startswith("past") and array.dtype != np.int8:
            spoilt[name] = array.copy()
            spoilt[name][:, :, [*range(6), *range(9 + tokens, 32)]] = np.nan  # type: ignore[index]
    np.testing.assert_array_equal(node.run(spoilt)["attended"], plain)


def test_threads_give_what_one_gives() -> None:
    case = Case(2000, (5000, 3000), (), 2016, 1, heads=8, head_dim=64)
    inputs = inputs_of(case, FLOAT, np.random.default_rng(2))
    inputs["count"] = np.array([1, 1])
    one, two = (node_of(replace(case, threads=threads), FLOAT, inputs).run(inputs) for threads in (1, 2))
    np.testing.assert_array_equal(one["attended"], two["attended"])


def _multiplies_bfloat16() -> bool:
    """Whether this process's level has products of bfloat16; only Linux machines with a file of flags do."""
    flags = Path("/proc/cpuinfo")
    return levels()[-1] == "avx512" and flags.is_file() and "avx512_bf16" in flags.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "rounded"), [(1, False), (15, False), (40, True)])
def test_only_chunks_are_rounded_and_only_where_allowed(kind: str, tokens: int, rounded: bool) -> None:
    case = Case(30, (60,), (), 80, tokens)
    inputs = inputs_of(case, kind, np.random.default_rng(6))
    inputs["count"] = np.array([tokens])
    absent, zero, one = (node_of(replace(case, rounds=r), kind, inputs).run(inputs)["attended"] for r in (None, 0, 1))
    np.testing.assert_array_equal(absent, zero)
    assert bool((one != zero).any()) == (rounded and _multiplies_bfloat16())


def test_no_tokens_and_no_rows() -> None:
    for starts, tokens in (((9, 2), 0), ((), 3)):
        case = replace(STEP, starts=starts, tokens=tokens)
        inputs = inputs_of(case, FLOAT, np.random.default_rng(3))
        outputs = node_of(case, FLOAT, inputs).run(inputs)
        assert outputs["attended"].size == 0
        np.testing.assert_array_equal(outputs["present_key"], np.asarray(inputs["past_key"]))


@pytest.mark.parametrize(
    ("words", "change", "rows"),
    [
        ("window \\+ tokens - 1 slots", {"slots": 5}, {}),
        ("longer than the ring", {"window": 0}, {}),
        ("more tokens at once", {"slots": 2}, {}),
        ("even number of elements", {"head_dim": 7}, {}),
        ("even number of elements", {"head_dim": 1026}, {}),
        ("multiple of the KV heads", {"heads": 3}, {}),
        ("at least 1", {"window": -1}, {}),
        ("rounds of 0 or 1", {"rounds": 2}, {}),
        ("start positions", {}, {"start": np.array([-1, 0])}),
        ("counts", {}, {"count": np.array([4, 0])}),
        ("counts", {}, {"count": np.array([-1, 0])}),
        (r"start and count \[B\]", {}, {"count": np.array([1])}),
        (r"cosines and sines \[B, T, D/2\]", {}, {"cos": np.zeros((2, 3, 8), np.float32)}),
        (r"rings \[B, G, S, D\]", {}, {"past_value": np.zeros((2, 2, 5, 8), np.float32)}),
        (r"key and value \[B, T, G, D\]", {}, {"value": np.zeros((2, 2, 2, 8), np.float32)}),
    ],
)
def test_what_is_refused(words: str, change: dict[str, int], rows: dict[str, Array]) -> None:
    case = replace(STEP, **change)  # type: ignore[arg-type]
    inputs = inputs_of(case, FLOAT, np.random.default_rng(4))
    inputs["count"] = np.array([3, 3])
    inputs |= rows
    with pytest.raises(Exception, match=words):
        node_of(case, FLOAT, inputs).run(inputs)


def test_scales_that_do_not_fit_are_refused() -> None:
    inputs = inputs_of(STEP, INT8, np.random.default_rng(5))
    inputs["past_value_scale"] = np.zeros((2, 2, 5), np.float32)
    with pytest.raises(Exception, match="scales"):
        node_of(STEP, INT8, inputs).run(inputs)
