"""Sessions on a toy bundle against a full-context oracle: lengths, chunks, rows, pieces, buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import Session, load
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from runtime.rolling_kv import kv_bytes
from tests.support.toy_bundle import TOLERANCE, ToyModel, write_toy_bundle


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, ToyModel().vocab_size, count)]


def open_toy(folder: Path, model: ToyModel) -> Session:
    return load(write_toy_bundle(folder, model), threads=1)


def error(logits_TV: NDArray[np.float32], model: ToyModel, text: list[int]) -> float:
    """Largest deviation of the last len(logits) positions of `text`."""
    return float(np.abs(logits_TV - model.oracle(text)[-len(logits_TV) :]).max())


def engine_of(session: Session) -> OnnxRuntimeEngine:
    engine = session._engine
    assert isinstance(engine, OnnxRuntimeEngine)
    return engine


@pytest.mark.parametrize("window,chunk", [(1, 1), (1, 3), (4, 1), (4, 3), (4, 4), (4, 9), (5, 2), (7, 7)])
def test_boundary_lengths_for_chunks_below_at_and_above_the_window(tmp_path: Path, window: int, chunk: int) -> None:
    model = ToyModel(windows=(window,), chunk=chunk)
    session = open_toy(tmp_path, model)
    W, C = window, chunk
    for length in sorted({max(W - 1, 1), W, W + 1, 2 * W + 1, 3 * W + C, 5 * (W + C)}):
        session.reset()
        logits_BTV = session.forward(tokens(length))
        assert logits_BTV.shape == (1, length, model.vocab_size)
        assert logits_BTV.dtype == np.float32
        assert error(logits_BTV[0], model, tokens(length)) < TOLERANCE
        assert session.position.tolist() == [length]


@pytest.mark.parametrize("windows,context", [((4, 2), None), ((3, None, 1), 64), ((None,), 64)])
def test_uneven_pieces_give_the_same_logits(
    tmp_path: Path, windows: tuple[int | None, ...], context: int | None
) -> None:
    model = ToyModel(windows=windows, chunk=3, context=context)
    session = open_toy(tmp_path, model)
    text = tokens(57)
    fed = 0
    for piece in (1, 2, 3, 4, 7, 1, 1, 13, 5, 20):
        logits_BTV = session.forward(np.array([text[fed : fed + piece]]))
        fed += piece
        assert error(logits_BTV[0], model, text[:fed]) < TOLERANCE
    assert fed == 57


def test_token_by_token_far_past_the_window(tmp_path: Path) -> None:
    model = ToyModel(windows=(4, 4), chunk=3)
    session = open_toy(tmp_path, model)
    text = tokens(40)  # the ring of 6 slots wraps six times
    logits = np.concatenate([session.forward([token])[0] for token in text])
    assert error(logits, model, text) < TOLERANCE


@pytest.mark.parametrize("padding", ["right", "left"])
def test_ragged_rows(tmp_path: Path, padding: str) -> None:
    model = ToyModel(windows=(4, 6), chunk=3)
    session = open_toy(tmp_path, model)
    rows = [tokens(11, 1), tokens(2, 2), tokens(29, 3)]
    logits_BTV = session.forward(rows, padding="left" if padding == "left" else "right")
    assert logits_BTV.shape == (3, 29, model.vocab_size)
    for row, logits_TV in zip(rows, logits_BTV, strict=True):
        valid = slice(29 - len(row), None) if padding == "left" else slice(len(row))
        assert error(logits_TV[valid], model, row) < TOLERANCE
        assert np.isnan(np.delete(logits_TV, np.arange(29)[valid], axis=0)).all()


def test_ragged_feeds_in_turn_with_idle_rows(tmp_path: Path) -> None:
    model = ToyModel(windows=(4, None), chunk=3, context=99)
    session = open_toy(tmp_path, model)
    texts: list[list[int]] = [[], [], []]
    for turn, lengths in enumerate([(5, 1, 9), (0, 7, 1), (1, 0, 0), (1, 1, 1), (13, 0, 4)]):
        pieces = [tokens(length, 10 * turn + row) for row, length in enumerate(lengths)]
        logits_BTV = session.forward(pieces)
        for row, piece in enumerate(pieces):
            texts[row] += piece
            if piece:
                assert error(logits_BTV[row, : len(piece)], model, texts[row]) < TOLERANCE
            assert np.isnan(logits_BTV[row, len(piece) :]).all()
    assert session.position.tolist() == [len(text) for text in texts] == [20, 9, 15]


def test_a_row_of_a_batch_equals_the_row_alone(tmp_path: Path) -> None:
    model = ToyModel(windows=(5,), chunk=4)
    session = open_toy(tmp_path, model)
    rows = [tokens(9, 4), tokens(17, 5)]
    together = session.forward(rows)
    for index, row in enumerate(rows):
        session.reset()
        assert np.abs(session.forward([row])[0] - together[index, : len(row)]).max() < TOLERANCE


def test_forward_last_is_the_end_of_forward(tmp_path: Path) -> None:
    session = open_toy(tmp_path, ToyModel(windows=(4,), chunk=3))
    rows = [tokens(8, 1), tokens(3, 2)]
    every_BTV = session.forward(rows)
    session.reset()
    last_BV = session.forward_last(rows)
    assert np.abs(last_BV - np.stack([every_BTV[0, 7], every_BTV[1, 2]])).max() < TOLERANCE
    last_BV = session.forward_last([[], [5]])
    assert np.isnan(last_BV[0]).all()
    assert np.isfinite(last_BV[1]).all()


def test_reset_starts_over_even_after_nan(tmp_path: Path) -> None:
    model = ToyModel(windows=(4,), chunk=3)
    session = open_toy(tmp_path, model)
    first = session.forward(tokens(10))
    for layer in engine_of(session).kv.layers:
        layer.key_BGSD[...] = np.nan
        layer.value_BGSD[...] = np.nan
    session.reset()
    assert session.position.tolist() == [0]
    assert not session.seen.any()
    assert np.array_equal(session.forward(tokens(10)), first)


def test_buffers_stay_in_place_and_constant(tmp_path: Path) -> None:
    model = ToyModel(windows=(4, 8), chunk=3)
    session = open_toy(tmp_path, model)
    formula = kv_bytes([6, 10], batch=1, num_kv_heads=2, head_dim=3, dtype="float32")
    assert session.kv_bytes == formula

    def addresses() -> list[int]:
        return [
            array.ctypes.data for layer in engine_of(session).kv.layers for array in (layer.key_BGSD, layer.value_BGSD)
        ]

    before = addresses()
    ring = engine_of(session).kv.layers[0].key_BGSD
    session.forward(tokens(1))
    assert ring[0, :, 0].any(), "the graph wrote the first slot of our own array"
    assert not ring[0, :, 1:].any(), "and no other"
    for count in (3, 1, 2, 30, 1, 1, 160):  # up to 20 windows and more
        session.forward(tokens(count))
        assert session.kv_bytes == formula
        assert addresses() == before
    session.reset()
    assert addresses() == before


def test_an_idle_row_keeps_its_ring_to_the_bit(tmp_path: Path) -> None:
    session = open_toy(tmp_path, ToyModel(windows=(4,), chunk=3))
    session.forward([tokens(9), tokens(5)])
    before = [layer.key_BGSD[0].copy() for layer in engine_of(session).kv.layers]
    session.forward([[], tokens(7)])
    after = [layer.key_BGSD[0] for layer in engine_of(session).kv.layers]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_buffers_follow_the_batch_of_the_first_feed(tmp_path: Path) -> None:
    model = ToyModel(windows=(4,), chunk=3)
    session = open_toy(tmp_path, model)
    one = session.kv_bytes
    session.forward([tokens(2), tokens(3), tokens(4)])
    assert (session.batch, session.kv_bytes) == (3, 3 * one)
    session.reset()
    assert session.kv_bytes == 3 * one
    logits_BTV = session.forward(tokens(5))
    assert (session.batch, session.kv_bytes) == (1, one)
    assert error(logits_BTV[0], model, tokens(5)) < TOLERANCE


def test_every_way_to_write_one_row(tmp_path: Path) -> None:
    session = open_toy(tmp_path, ToyModel())
    expected = session.forward([[3, 1, 4]])
    forms = ([3, 1, 4], (3, 1, 4), np.array([3, 1, 4]), np.array([[3, 1, 4]], dtype=np.uint8), [np.array([3, 1, 4])])
    for form in forms:
        session.reset()
        assert np.array_equal(session.forward(form), expected)


def test_result_is_a_copy(tmp_path: Path) -> None:
    session = open_toy(tmp_path, ToyModel())
    first = session.forward([5])
    kept = first.copy()
    session.forward([9])
    assert np.array_equal(first, kept)
