"""The rings of an engine: their bytes, their place in memory, and what they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from reference.parity import budget
from reference.step import Step
from runtime import Session
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from tests.support.bundles import Exported, exported
from tests.support.parity import fill, largest_error, random_rows

MIXED: dict[str, Any] = {"architecture": "ministral", "num_layers": 3, "layer_windows": [4, None, 4]}
"""One model of both kinds of layer for all tests here; slots are 4 + 3 − 1 = 6 and the context, 90."""


def engine_of(session: Session) -> OnnxRuntimeEngine:
    assert isinstance(session._engine, OnnxRuntimeEngine)
    return session._engine


def addresses(session: Session) -> list[int]:
    return [b.ctypes.data for layer in engine_of(session).kv.layers for b in (layer.key_BGSD, layer.value_BGSD)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings,context,slots", [({}, None, [7, 7]), (MIXED, 90, [6, 90, 6])], ids=["all", "mixed"])
def test_bytes_and_buffers_do_not_change_from_1_to_20_windows(
    settings: dict[str, Any], context: int | None, slots: list[int], batch: int
) -> None:
    case = exported(chunk=3, context=context, **settings)
    config = case.opened().config
    window = next(window for window in config.layer_windows if window is not None)
    expected = 2 * batch * config.num_kv_heads * config.head_dim * 4 * sum(slots)
    session = case.session()
    rows = random_rows([20 * window] * batch, config.vocab_size, seed=1)
    fed, seen = 0, set()
    for size in (1, window - 1, 1, window, 5 * window, 13 * window - 1):
        session.forward([row[fed : fed + size] for row in rows])
        fed += size
        seen.add((session.kv_bytes, *addresses(session)))
        assert session.position.tolist() == [fed] * batch
    assert fed == 20 * window
    assert len(seen) == 1
    assert session.kv_bytes == expected
    held = [b.nbytes for layer in engine_of(session).kv.layers for b in (layer.key_BGSD, layer.value_BGSD)]
    assert sum(held) == expected


class TracedStep:
    """The step that was traced, in plain PyTorch, with rings of its own that begin empty."""

    def __init__(self, case: Exported, batch: int, dtype: torch.dtype) -> None:
        config = case.opened().config
        self._step = fill(Step(config, device="meta", dtype=dtype), case.opened(), dtype)
        slots = [layer.capacity for layer in case.session().manifest.kv.layers]
        shapes = [(batch, config.num_kv_heads, size, config.head_dim) for size in slots]
        self._rings = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for shape in shapes]

    def run(self, *inputs: NDArray[np.int64]) -> tuple[NDArray[np.floating], list[NDArray[np.floating]]]:
        """Logits [B, T, V] and all rings, as [rows, D]."""
        logits, self._rings = self._step(*map(torch.from_numpy, inputs), self._rings)
        return logits.numpy(), [ring.flatten(0, 2).numpy() for pair in self._rings for ring in pair]


def test_rings_hold_what_the_traced_step_says_also_at_far_positions() -> None:
    """Ragged counts, an idle row, wrapped rings, and starts far beyond any text that the other tests can feed."""
    case = exported(chunk=3)
    vocab_size = case.opened().config.vocab_size
    truth, reference = (TracedStep(case, 3, dtype) for dtype in (torch.float64, torch.float32))
    engine = engine_of(case.session())
    engine.allocate(3)
    rng = np.random.default_rng(4)
    start_B = np.array([0, 131_070, 2**24 - 40])
    for step in range(12):
        count_B = np.array([3, (0, 1, 2)[step % 3], 1])
        valid = np.arange(3) < count_B[:, None]
        inputs = (rng.integers(0, vocab_size, (3, 3)), start_B, count_B, np.tile(np.arange(3), (3, 1)))
        logits = engine.step(*inputs)
        rings = [b for layer in engine.kv.layers for b in (layer.key_BGSD, layer.value_BGSD)]
        true_logits, true_rings = truth.run(*inputs)
        near_logits, near_rings = reference.run(*inputs)
        allowed = budget([true_logits[valid]], [near_logits[valid]], "float32").allowed
        assert largest_error([true_logits[valid]], [logits[valid]]) <= allowed
        allowed = budget(true_rings, near_rings, "float32").allowed
        flat = [ring.reshape(-1, ring.shape[-1]).astype(np.float32, copy=False) for ring in rings]
        assert largest_error(true_rings, flat) <= allowed
        start_B = start_B + count_B


def test_padding_and_idle_rows_leave_every_bit_of_the_rings() -> None:
    case = exported(chunk=3)
    engine = engine_of(case.session())
    engine.allocate(2)
    tokens, nothing = np.array([[7, 8, 9], [10, 11, 12]]), np.zeros((2, 0), np.int64)
    for start in range(0, 12, 3):
        engine.step(tokens, np.array([start, start]), np.array([3, 3]), nothing)
    before = [(layer.key_BGSD.copy(), layer.value_BGSD.copy()) for layer in engine.kv.layers]
    engine.step(tokens, np.array([12, 12]), np.array([1, 0]), nothing)
    for layer, (key, value) in zip(engine.kv.layers, before, strict=True):
        for now, then in ((layer.key_BGSD, key), (layer.value_BGSD, value)):
            changed = np.flatnonzero((now[0] != then[0]).any(axis=(0, 2)))
            assert changed.tolist() == [12 % 7]
            assert np.array_equal(now[1], then[1])
