"""Rings of float16 and of int8: engines at every border of the window against the reference and transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.kernels import kernels
from runtime.rolling_kv import kv_bytes
from tests.support.bundles import Exported, exported
from tests.support.parity import Judge, boundary_lengths, feed, random_rows

TYPES = ("float16", "int8")
MODELS: dict[str, tuple[int | None, dict[str, Any]]] = {
    # name: window of the layers that slide, checkpoint
    "gqa": (5, {}),
    "mqa, window of one, wide heads": (1, {"num_kv_heads": 1, "head_dim": 12}),
    "mixture of experts": (4, {"architecture": "mixtral", "window": 4}),
    "layers of both kinds, norms of heads": (
        4,
        {"architecture": "qwen3", "num_layers": 3, "layer_windows": [4, None, 4], "context": 40, "tie": True},
    ),
}
NATIVE = [True, False] if kernels() is not None else [False]


def case_of(name: str, kv: str, chunk: int) -> Exported:
    window, settings = MODELS[name]
    return exported(chunk=chunk, options={"kv": kv}, **({"window": window} | settings))


@pytest.mark.parametrize("native", NATIVE, ids=lambda native: "kernels" if native else "bodies")
@pytest.mark.parametrize("kv", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_engines_at_the_borders_of_the_window(
    name: str, kv: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setenv("CIERZO_KERNELS", "off")
    window = MODELS[name][0]
    assert window is not None
    for chunk in (3, 5):
        case = case_of(name, kv, chunk)
        judge, session = Judge(case), case.session()
        assert bool(session.kernels) == native
        lengths = boundary_lengths(window, chunk)
        for length in lengths:
            judge.hold(session, random_rows([length], judge.vocab_size, seed=length), seed=chunk)
        session = case.session()
        judge.hold(session, random_rows([1, lengths[-1], 2], judge.vocab_size, seed=chunk), seed=3)


@pytest.mark.parametrize("kv", TYPES)
def test_far_past_the_window(kv: str) -> None:
    case = case_of("gqa", kv, 3)
    judge, session = Judge(case), case.session()
    judge.hold(session, random_rows([100, 60], judge.vocab_size, seed=5), seed=6)


@pytest.mark.parametrize("kv", TYPES)
def test_a_budget_that_a_window_off_by_one_would_not_meet(kv: str) -> None:
    """The room that rounding needs is far from what a wrong window does, so that the tests above mean something."""
    case, other = case_of("gqa", kv, 3), exported(chunk=3, options={"kv": kv}, window=4)
    judge = Judge(case)
    rows = random_rows([20], judge.vocab_size, seed=2)
    truth, allowed = judge.truth_and_budget(rows)
    narrow = feed(other.session(), [rows])
    assert np.abs(truth[0] - narrow[0]).max() > 2 * allowed.allowed


@pytest.mark.parametrize("kv", TYPES)
def test_the_rings_take_what_the_type_takes(kv: str) -> None:
    case = case_of("gqa", kv, 3)
    config = case.opened().config
    slots = [layer.capacity for layer in case.session().manifest.kv.layers]
    each = config.num_kv_heads * sum(slots) * 2  # keys and values
    assert case.session().kv_bytes == each * (config.head_dim * 2 if kv == "float16" else config.head_dim + 4)
    assert case.session().kv_bytes == kv_bytes(
        slots, batch=1, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=kv
    )
