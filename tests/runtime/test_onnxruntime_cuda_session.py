"""The engine of ONNX Runtime on CUDA, on the CPU provider: the same class, bindings and memory, in another place.

Its memory is poisoned before and after use (tests/support/host_place.py), so that equality shows more here than that
the numbers are right. What only a GPU's provider does is in test_onnxruntime_cuda_steps.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Session, SessionError, load
from runtime.engine_weights import LOADING
from runtime.onnxruntime_cuda.widths import padded_width
from runtime.step_engine_info import StepEngineInfo
from tests.support.toy_bundle import TOLERANCE, ToyModel, write_toy_bundle
from tests.support.toy_steps import Opened, open_steps, write_step_engine

MODEL = ToyModel(windows=(4, None, 6), chunk=3, context=60, seed=3)
Made = tuple[Path, StepEngineInfo]


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, MODEL.vocab_size, count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = write_toy_bundle(tmp_path_factory.mktemp("toy"), MODEL)
    return folder, write_step_engine(folder, MODEL)


@pytest.fixture
def opened(made: Made) -> Opened:
    return open_steps(*made)


@pytest.fixture(scope="module")
def other(made: Made) -> Session:
    return load(made[0], threads=1)


@pytest.fixture(autouse=True)
def _from_the_start(other: Session) -> None:
    other.reset()


def assert_near(ours: Session, other: Session, feeds: Sequence[Any]) -> None:
    """NaN stands for rows that idle, in both."""
    for feed in feeds:
        found, expected = ours.forward(feed), other.forward(feed)
        assert np.array_equal(np.isnan(found), np.isnan(expected)), feed
        assert np.nanmax(np.abs(found - expected)) < TOLERANCE, feed
        assert np.array_equal(ours.position, other.position)


# -- the same numbers --------------------------------------------------------------------------------------------------


def test_pieces_of_any_length(opened: Opened, other: Session) -> None:
    feeds = [tokens(count, seed) for seed, count in enumerate([1, 1, 1, 2, 3, 4, 7, 1, 1, 1, 13, 1, 5])]
    assert_near(opened.session, other, feeds)


def test_ragged_rows_and_idle_ones(opened: Opened, other: Session) -> None:
    lengths = [(5, 1, 9), (1, 1, 1), (0, 7, 1), (1, 0, 0), (1, 1, 1), (1, 0, 1), (13, 0, 4), (1, 1, 1)]
    feeds = [[tokens(n, 10 * turn + row) for row, n in enumerate(rows)] for turn, rows in enumerate(lengths)]
    assert_near(opened.session, other, feeds)


def test_another_number_of_rows_after_a_reset(opened: Opened, other: Session) -> None:
    for batch in (1, 3, 2, 4, 1):
        feeds = [[tokens(5, batch + row) for row in range(batch)], *([[[row] for row in range(batch)]] * 4)]
        assert_near(opened.session, other, feeds)
        opened.session.reset()
        other.reset()


def test_only_the_last_logits(opened: Opened, other: Session) -> None:
    for feed in ([tokens(8, 1), tokens(3, 2)], [[], [5]], [[1], [2]], [tokens(7), []]):
        found, expected = opened.session.forward_last(feed), other.forward_last(feed)
        assert np.array_equal(np.isnan(found), np.isnan(expected))
        assert np.nanmax(np.abs(found - expected)) < TOLERANCE


def test_a_reset_forgets(opened: Opened, other: Session) -> None:
    opened.session.forward(tokens(7, 4))
    opened.session.reset()
    assert_near(opened.session, other, [tokens(7, 5), [3]])


def test_the_oracle_says_so_too(opened: Opened) -> None:
    text = tokens(31, 8)
    logits_TV = np.concatenate([opened.session.forward(text[begin : begin + 4])[0] for begin in range(0, 31, 4)])
    assert np.abs(logits_TV - MODEL.oracle(text)).max() < TOLERANCE


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"temperature": 1.5, "top_k": 5, "seed": 3}], ids=str
)
def test_generations_choose_the_same_ids(opened: Opened, other: Session, options: dict[str, Any]) -> None:
    prompts = [tokens(7, 1), tokens(1, 2), tokens(11, 3)]
    found = [s.generate_batch(prompts, max_new_tokens=12, stop_ids=[], **options) for s in (opened.session, other)]
    assert found[0] == found[1]


def test_only_windows_or_none(tmp_path: Path) -> None:
    """Without a window there is neither scratch memory nor an input of bounds."""
    for windows in ((4, 2), (None, None)):
        model = ToyModel(windows=windows, chunk=3, context=40)
        folder = write_toy_bundle(tmp_path / str(windows), model)
        opened = open_steps(folder, write_step_engine(folder, model))
        asked = [what for what, _ in opened.memory.asked if what.endswith("laid out straight,")]
        assert len(asked) == (windows[0] is not None)
        text = tokens(20)
        logits_TV = np.concatenate([opened.session.forward(part)[0] for part in (text[:7], text[7:8], text[8:])])
        assert np.abs(logits_TV - model.oracle(text)).max() < TOLERANCE


def test_weights_that_a_session_is_given_as_constants(tmp_path: Path) -> None:
    folder = write_toy_bundle(tmp_path, MODEL)
    constants = ("embed", "lm_head", "0.q")
    reports: list[tuple[str, int, int]] = []
    info = write_step_engine(folder, MODEL, constants=constants)
    opened = open_steps(folder, info, progress=lambda *said: reports.append(said))
    total = sum(weight.nbytes for weight in MODEL.weights.values())
    assert reports[-1] == (LOADING, total, total)
    text = tokens(9)
    logits_TV = np.concatenate([opened.session.forward(part)[0] for part in (text[:7], text[7:8], text[8:])])
    assert np.abs(logits_TV - MODEL.oracle(text)).max() < TOLERANCE
    (weights,) = [nbytes for what, nbytes in opened.memory.asked if what.startswith("the weights")]
    assert 0 < weights <= sum(-(-w.nbytes // 256) * 256 for name, w in MODEL.weights.items() if name not in constants)


def test_steps_come_in_a_few_widths(tmp_path: Path) -> None:
    widths = [padded_width(tokens, 300) for tokens in range(1, 301)]
    assert sorted(set(widths)) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert all(width >= tokens for tokens, width in enumerate(widths, start=1))
    model = ToyModel(windows=(4, None, 6), chunk=11, context=60)
    folder = write_toy_bundle(tmp_path, model)
    opened = open_steps(folder, write_step_engine(folder, model))
    text, begin = tokens(40, 2), 0
    for count in (5, 3, 6, 9, 2, 1, 11):  # widths 8, 4, 8, 11, 2, 1, 11
        rows = [text[begin : begin + count], text[begin : begin + count]]
        begin += count
        found = opened.session.forward(rows)
        for row in found:
            assert np.abs(row - model.oracle(text[:begin])[-count:]).max() < TOLERANCE


# -- what a step brings to the device and back ----------------------------------------------------------------------


def test_a_step_of_one_token_is_one_copy_in_and_one_out(opened: Opened) -> None:
    opened.session.forward(tokens(7))
    for batch in (1, 3):
        opened.session.reset()
        opened.session.forward([tokens(7)] * batch)
        opened.memory.writes.clear()
        opened.memory.reads.clear()
        opened.session.forward([[1]] * batch)
        assert opened.memory.writes == [2 * 256 + 8 * batch]  # starts, counts and ids, each at an aligned address
        assert opened.memory.reads == [4 * MODEL.vocab_size * batch]


def test_a_chunk_that_nobody_asks_of_brings_no_logits_back(opened: Opened) -> None:
    opened.session.forward_last(tokens(8))
    assert opened.memory.reads == [4 * MODEL.vocab_size]
    opened.memory.reads.clear()
    list(opened.session.generate([1, 2], max_new_tokens=3, stop_ids=[]))
    assert opened.memory.reads == [256 + 8 * MODEL.vocab_size] * 3, "of a small vocabulary all values and ids"


def test_a_step_without_logits_gives_none(opened: Opened) -> None:
    none_B0 = np.zeros((1, 0), np.int64)
    for width in (1, 3):
        ids_BT = np.ones((1, width), np.int64)
        step = (ids_BT, np.zeros(1, np.int64), np.full(1, width, np.int64), none_B0)
        assert opened.engine.step(*step).shape == (1, 0, MODEL.vocab_size)
        found = opened.engine.top.step(*step, 4)
        assert found.values_BRK.shape == found.ids_BRK.shape == (1, 0, 4)


def test_what_a_session_says_of_itself(opened: Opened) -> None:
    session = opened.session
    assert (session.kernels, session.notes) == ((), ())
    numerics = opened.engine.numerics
    assert (numerics.arithmetic, numerics.kv, numerics.rounds_activations, numerics.rings) == (
        "float32", "float32", False, 1,
    )  # fmt: skip
    width = MODEL.num_kv_heads * MODEL.head_dim
    assert session.kv_bytes == 2 * 4 * width * (4 + (60 + 3) + 6)
    with pytest.raises(SessionError, match="no profile"):
        session.end_profile()
