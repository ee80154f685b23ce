"""The highest logits, found by the small graph on the device and put in order on the host: ties, NaN, infinities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.build.top_logits import top_logits_model
from runtime import load
from runtime.backends.base import TopLogits
from runtime.onnxruntime_cuda.highest import Highest, in_order, most_given
from runtime.onnxruntime_cuda.sessions import StepSession
from runtime.step_engine_info import TOP_LOGITS
from tests.support.host_place import HostMemory, host_place
from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_steps import open_steps, write_step_engine


class Finder:
    """Runs the graph on logits [B, V]. fetched: how often all logits were asked for."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.vocab_size, self.fetched = vocab_size, 0
        path = folder / f"top{vocab_size}.onnx"
        path.write_bytes(top_logits_model(vocab_size).SerializeToString())
        self._place = host_place(HostMemory())
        self._session = StepSession(path, self._place)

    def find(self, logits_BV: NDArray[np.float32], count: int) -> TopLogits:
        batch, memory = len(logits_BV), self._place.memory
        block = memory.allocate(logits_BV.nbytes, "logits")
        memory.write(block.address, np.ascontiguousarray(logits_BV).reshape(-1).view(np.uint8))
        highest = Highest(self._session, memory, block.address, batch, self.vocab_size, 1)

        def fetch() -> NDArray[np.float32]:
            self.fetched += 1
            return logits_BV[:, None].copy()

        return highest.find(count, fetch)


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    return Finder(tmp_path_factory.mktemp("top"), 300)


def expected(logits_BV: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    return np.argsort(-logits_BV, axis=-1, kind="stable")[:, None, :count]


def logits(batch: int = 3, vocab_size: int = 300, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (batch, vocab_size)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 50, 64])
def test_they_are_those_of_all_logits(finder: Finder, count: int) -> None:
    logits_BV, before = logits(), finder.fetched
    found = finder.find(logits_BV, count)
    assert np.array_equal(found.ids_BRK, expected(logits_BV, count))
    assert np.array_equal(found.values_BRK, np.take_along_axis(logits_BV[:, None], found.ids_BRK, axis=-1))
    assert found.values_BRK.dtype == np.float32
    assert finder.fetched == before, "nothing here needs all logits"


@pytest.mark.parametrize("vocab_size", [1, 37, 64, 65, 66])
def test_vocabularies_about_as_small_as_what_is_fetched(tmp_path: Path, vocab_size: int) -> None:
    most = most_given(vocab_size)
    assert most == min(vocab_size, TOP_LOGITS - 1)
    small = Finder(tmp_path, vocab_size)
    logits_BV = np.round(logits(4, vocab_size))  # full of ties
    for count in {1, most}:
        assert np.array_equal(small.find(logits_BV, count).ids_BRK, expected(logits_BV, count))


def test_ties_come_by_id_whatever_the_library_does(finder: Finder) -> None:
    logits_BV = np.round(logits(4))
    for count in (1, 5, 64):
        assert np.array_equal(finder.find(logits_BV, count).ids_BRK, expected(logits_BV, count))
    values_BK, ids_BK = np.array([[3, 3, 2, 2, 2]], np.float32), np.array([[9, 4, 8, 1, 5]])
    assert in_order(values_BK, ids_BK, 4)[1].tolist() == [[4, 9, 1, 5]]


def test_more_ties_than_are_fetched(finder: Finder) -> None:
    """Of 200 equal logits the library may give any: then all are looked at."""
    logits_BV, before = logits(2), finder.fetched
    logits_BV[1, 100:] = 50.0
    logits_BV[1, 250] = 60.0
    found = finder.find(logits_BV, 3)
    assert found.ids_BRK[1, 0].tolist() == [250, 100, 101]
    assert np.array_equal(found.ids_BRK[:1], expected(logits_BV[:1], 3))
    assert finder.fetched == before + 1
    assert finder.find(logits_BV, 1).ids_BRK[1, 0].tolist() == [250]
    assert finder.fetched == before + 1, "the best is no tie with those that are missing"


@pytest.mark.parametrize("where", [0, 150, 299])
def test_a_nan_anywhere_makes_the_first_value_one(finder: Finder, where: int) -> None:
    logits_BV = logits()
    logits_BV[1, where] = np.nan
    found = finder.find(logits_BV, 2)
    assert np.isnan(found.values_BRK[1, 0, 0])
    for row in (0, 2):
        assert np.array_equal(found.ids_BRK[row], expected(logits_BV, 2)[row])
    logits_BV[1] = np.nan
    assert np.isnan(finder.find(logits_BV, 2).values_BRK[1, 0, 0])


def test_infinities_are_what_they_are(finder: Finder) -> None:
    logits_BV = logits(2)
    logits_BV[0, 7] = np.inf
    logits_BV[1, 3:] = -np.inf
    found = finder.find(logits_BV, 4)
    assert found.values_BRK[0, 0, 0] == np.inf
    assert np.array_equal(found.ids_BRK, expected(logits_BV, 4))
    assert found.values_BRK[1, 0, 3] == -np.inf


def test_a_session_asks_it(tmp_path: Path) -> None:
    model = ToyModel(windows=(4,), vocab_size=90)
    folder = write_toy_bundle(tmp_path, model)
    opened, other = open_steps(folder, write_step_engine(folder, model)), load(folder, threads=1)
    assert opened.session.most_top == 64
    for options in ({}, {"temperature": 1.2, "top_k": 7, "seed": 5}, {"temperature": 1.2, "top_k": 64, "seed": 5}):
        opened.session.reset()
        other.reset()
        found = [
            s.generate_batch([[5, 6], [7]], max_new_tokens=9, stop_ids=[], **options) for s in (opened.session, other)
        ]
        assert found[0] == found[1]
    opened.session.reset()
    opened.memory.reads.clear()
    list(opened.session.generate([1, 2], max_new_tokens=4, stop_ids=[]))
    assert opened.memory.reads == [-(-4 * 65 // 256) * 256 + 8 * 65] * 4
