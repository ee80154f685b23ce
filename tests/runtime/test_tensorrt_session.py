"""The TensorRT backend's engine on a double of a GPU: the same numbers as ONNX Runtime's, with nothing left to chance.

The double runs what is queued as late as it may and poisons memory (tests/support/gpu_double.py), so that equality
shows more here than that the numbers are right.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import Session, SessionError, load
from tests.support.engine_doubles import ROLLING, Doubled, embedded
from tests.support.gpu_double import HostDevice
from tests.support.toy_bundle import ToyModel, write_toy_bundle

MODEL = ToyModel(windows=(4, 6), chunk=3, seed=3)
IN_PLACE = [ROLLING, ()]


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, MODEL.vocab_size, count)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"), MODEL)


@pytest.fixture(scope="module")
def other(bundle: Path) -> Session:
    return load(bundle, threads=1)


@pytest.fixture(autouse=True)
def _from_the_start(other: Session) -> None:
    other.reset()


def assert_equal(ours: Session, other: Session, feeds: Sequence[Any]) -> None:
    for feed in feeds:
        assert np.array_equal(ours.forward(feed), other.forward(feed), equal_nan=True), feed
        assert np.array_equal(ours.position, other.position)


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", IN_PLACE, ids=["in place", "turning"])
def test_pieces_of_any_length_give_the_logits_of_onnx_runtime(
    bundle: Path, other: Session, plugins: Sequence[str]
) -> None:
    feeds = [tokens(count, seed) for seed, count in enumerate([1, 1, 1, 2, 3, 4, 7, 1, 1, 1, 13, 1, 5])]
    assert_equal(embedded(bundle, plugins=plugins).session, other, feeds)


@pytest.mark.parametrize("plugins", IN_PLACE, ids=["in place", "turning"])
def test_ragged_rows_and_idle_ones_too(bundle: Path, other: Session, plugins: Sequence[str]) -> None:
    lengths = [(5, 1, 9), (1, 1, 1), (0, 7, 1), (1, 0, 0), (1, 1, 1), (1, 0, 1), (13, 0, 4), (1, 1, 1)]
    feeds = [[tokens(n, 10 * turn + row) for row, n in enumerate(rows)] for turn, rows in enumerate(lengths)]
    assert_equal(embedded(bundle, plugins=plugins).session, other, feeds)


@pytest.mark.parametrize("plugins", IN_PLACE, ids=["in place", "turning"])
def test_another_number_of_rows_after_a_reset(bundle: Path, other: Session, plugins: Sequence[str]) -> None:
    ours = embedded(bundle, plugins=plugins).session
    for batch in (1, 3, 2, 4, 1):
        feeds = [[tokens(5, batch + row) for row in range(batch)], *([[[row] for row in range(batch)]] * 4)]
        assert_equal(ours, other, feeds)
        ours.reset()
        other.reset()


def test_only_the_last_logits(bundle: Path, other: Session) -> None:
    ours = embedded(bundle).session
    for feed in ([tokens(8, 1), tokens(3, 2)], [[], [5]], [[1], [2]], [tokens(7), []]):
        assert np.array_equal(ours.forward_last(feed), other.forward_last(feed), equal_nan=True)


def test_a_reset_forgets(bundle: Path, other: Session) -> None:
    doubled = embedded(bundle, plugins=())
    doubled.session.forward(tokens(7, 4))
    doubled.session.reset()
    assert_equal(doubled.session, other, [tokens(7, 5), [3]])


GREEDY: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.3}]
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.5, "seed": 3, **more}
    for more in (
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 36},
        {"top_k": 37},
        {"top_k": 99},
        {"top_p": 0.8},
        {"min_p": 0.1},
    )
] + [{"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "seed": 4}]


@pytest.mark.parametrize("options", GREEDY + SAMPLED, ids=str)
def test_generations_choose_the_same_ids(bundle: Path, other: Session, options: dict[str, Any]) -> None:
    ours = embedded(bundle).session
    prompts = [tokens(7, 1), tokens(1, 2), tokens(11, 3)]
    for session in (ours, other):
        session.reset()
    found = [s.generate_batch(prompts, max_new_tokens=12, stop_ids=[], **options) for s in (ours, other)]
    assert found[0] == found[1]


# -- how they come about -----------------------------------------------------------------------------------------------


def since(doubled: Doubled, count: int) -> list[str]:
    return doubled.device.log[count:]


def test_single_tokens_run_in_the_decode_plan_as_a_graph(bundle: Path) -> None:
    doubled = embedded(bundle)
    doubled.session.forward(tokens(8))
    assert doubled.device.log == ["prefill"] * 3
    for _ in range(5):
        doubled.session.forward([1])
    # The first one runs kernel by kernel, the second one is captured, and from then on the graph is launched.
    assert since(doubled, 3) == ["decode", "capture", "decode", "graph", "graph", "graph", "graph"]


def test_the_last_token_of_a_chunked_feed_runs_there_as_well(bundle: Path) -> None:
    doubled = embedded(bundle)
    doubled.session.forward(tokens(7))
    assert doubled.device.log == ["prefill", "prefill", "decode"]


def test_a_graph_is_captured_anew_for_other_memory(bundle: Path, other: Session) -> None:
    doubled = embedded(bundle)
    for rows in ([[1]], [[1], [2]], [[1]]):
        count = len(doubled.device.log)
        doubled.session.reset()
        other.reset()
        assert_equal(doubled.session, other, [rows] * 4)
        assert since(doubled, count) == ["decode", "capture", "decode", "graph", "graph", "graph"]


def test_a_reset_keeps_the_graph(bundle: Path, other: Session) -> None:
    doubled = embedded(bundle)
    assert_equal(doubled.session, other, [[1]] * 3)
    count = len(doubled.device.log)
    doubled.session.reset()
    other.reset()
    assert_equal(doubled.session, other, [[1]] * 3)
    assert since(doubled, count) == ["graph"] * 3


@pytest.mark.parametrize("plugins", IN_PLACE, ids=["in place", "turning"])
def test_steps_that_want_something_else_have_graphs_of_their_own(
    bundle: Path, other: Session, plugins: Sequence[str]
) -> None:
    sessions = (embedded(bundle, plugins=plugins).session, other)
    greedy: dict[str, Any] = {"max_new_tokens": 5, "stop_ids": []}
    drawn: dict[str, Any] = greedy | {"temperature": 1.0, "top_k": 3, "seed": 1}
    for _ in range(3):
        assert_equal(*sessions, [[token] for token in range(5)])
        for options in (greedy, drawn):
            ours, theirs = (list(session.generate([7], **options)) for session in sessions)
            assert ours == theirs
        last = [session.forward_last([8]) for session in sessions]
        assert np.array_equal(last[0], last[1])


def test_rings_that_turn_have_a_graph_for_each_side(bundle: Path, other: Session) -> None:
    doubled = embedded(bundle, plugins=())
    assert_equal(doubled.session, other, [[token] for token in range(8)])
    assert doubled.device.log == [*["decode"] * 2, *["capture", "decode", "graph"] * 2, *["graph"] * 4]


def test_where_nothing_can_be_captured_steps_run_all_the_same_and_a_note_says_so(bundle: Path, other: Session) -> None:
    doubled = embedded(bundle, device=HostDevice(capturable=False))
    assert not doubled.session.notes
    assert_equal(doubled.session, other, [[token] for token in range(5)])
    (note,) = doubled.session.notes
    assert "not as a CUDA graph" in note
    assert "this stream cannot be captured." in note
    assert doubled.device.log.count("capture") == 1
    assert "graph" not in doubled.device.log


@pytest.mark.parametrize("collects", [True, False])
def test_lost_memory_is_not_found_during_a_capture(
    bundle: Path, other: Session, monkeypatch: pytest.MonkeyPatch, collects: bool
) -> None:
    doubled = embedded(bundle)
    begin, thresholds, was = HostDevice.begin_capture, gc.get_threshold(), gc.isenabled()

    def lose_memory(device: HostDevice) -> None:
        lost: list[Any] = [device.allocate(8, "nobody")]
        lost.append(lost)
        begin(device)

    monkeypatch.setattr(HostDevice, "begin_capture", lose_memory)
    (gc.enable if collects else gc.disable)()
    gc.set_threshold(1)
    try:
        assert_equal(doubled.session, other, [[token] for token in range(4)])
        assert gc.isenabled() == collects
    finally:
        gc.set_threshold(*thresholds)
        (gc.enable if was else gc.disable)()
    assert doubled.device.log.count("graph") == 3


def test_a_chunk_that_nobody_asks_of_brings_no_logits_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = embedded(bundle)
    copied: list[int] = []
    copy_out = HostDevice.copy_out

    def counted(device: HostDevice, target: NDArray[np.uint8], address: int) -> None:
        copied.append(target.nbytes)
        copy_out(device, target, address)

    monkeypatch.setattr(HostDevice, "copy_out", counted)
    doubled.session.forward_last(tokens(8))
    assert copied == [4 * MODEL.vocab_size]
    copied.clear()
    list(doubled.session.generate([1, 2], max_new_tokens=3, stop_ids=[]))
    assert copied == [256 + 4] * 3, "of a greedy step one number and one id come back, each at an aligned address"


def test_a_step_without_logits_gives_none(bundle: Path) -> None:
    doubled = embedded(bundle)
    none_B0 = np.zeros((1, 0), np.int64)
    for width in (1, 3):
        ids_BT = np.ones((1, width), np.int64)
        logits = doubled.engine.step(ids_BT, np.zeros(1, np.int64), np.full(1, width, np.int64), none_B0)
        assert logits.shape == (1, 0, MODEL.vocab_size)
        assert doubled.engine.top is not None
        found = doubled.engine.top.step(ids_BT, np.zeros(1, np.int64), np.full(1, width, np.int64), none_B0, 4)
        assert found.values_BRK.shape == found.ids_BRK.shape == (1, 0, 4)


def test_the_highest_logits_are_those_of_all_logits(bundle: Path) -> None:
    doubled = embedded(bundle)
    top = doubled.engine.top
    assert top is not None
    assert top.most == MODEL.vocab_size
    for ids_BT in (np.array([[3]]), np.array([[3, 4, 5]])):
        width = np.full(1, ids_BT.shape[1], np.int64)
        found = top.step(ids_BT, np.zeros(1, np.int64), width, width[:, None] - 1, 6)
        logits_V = top.logits()[0, 0]
        order = np.argsort(-logits_V, kind="stable")[:6]
        assert found.ids_BRK[0, 0].tolist() == order.tolist()
        assert np.array_equal(found.values_BRK[0, 0], logits_V[order])


def test_on_a_gpu_without_kernels_of_ours_all_logits_come_back(bundle: Path, other: Session) -> None:
    doubled = embedded(bundle, device=HostDevice(compute_capability="7.5"))
    assert doubled.session.most_top == 0
    prompt = tokens(4)
    assert list(doubled.session.generate(prompt, max_new_tokens=5)) == list(other.generate(prompt, max_new_tokens=5))


def test_what_a_session_says_of_itself(bundle: Path) -> None:
    session = embedded(bundle).session
    assert session.kernels == ROLLING
    assert session.notes == ()
    with pytest.raises(SessionError, match="no profile"):
        session.end_profile()
