"""A session after something went wrong half-way: it never goes on with a state that nobody knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import runtime.backends.onnxruntime
from runtime import Session, SessionError, load
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from runtime.rolling_kv import RollingKV
from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_tokenizers import byte_level

TEXT = [1, 5, 7, 9, 11, 13, 4, 6]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"), ToyModel(windows=(4, 4), chunk=3))


@pytest.fixture
def session(bundle: Path) -> Session:
    return load(bundle, threads=1)


def interrupt(*_: Any, **__: Any) -> NoReturn:
    raise KeyboardInterrupt


def assert_works_after_reset(session: Session, bundle: Path) -> None:
    with pytest.raises(SessionError, match=r"reset\(\)"):
        session.forward(TEXT)
    session.reset()
    assert session.position.tolist() == [0] * session.batch
    assert np.array_equal(session.forward(TEXT), load(bundle, threads=1).forward(TEXT))


def test_an_interrupt_between_two_chunks(session: Session, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = OnnxRuntimeEngine.step, iter(range(9))

    def second_is_interrupted(engine: OnnxRuntimeEngine, *feed: Any) -> Any:
        return interrupt() if next(steps) == 1 else step(engine, *feed)

    session.forward([2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeEngine, "step", second_is_interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.forward(TEXT)
    assert_works_after_reset(session, bundle)


def test_an_interrupt_while_the_width_is_bound(session: Session, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.forward([2])
    with monkeypatch.context() as patch:
        patch.setattr(runtime.backends.onnxruntime, "_view", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.forward(TEXT)
    assert_works_after_reset(session, bundle)


def test_an_interrupted_reset(session: Session, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.forward(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(RollingKV, "clear", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.reset()
    assert_works_after_reset(session, bundle)


def test_buffers_that_do_not_fit_into_memory(session: Session, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any, **__: Any) -> NoReturn:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runtime.backends.onnxruntime, "RollingKV", too_large)
        with pytest.raises(MemoryError):
            session.forward([TEXT, TEXT])
    assert session.batch == 1
    assert_works_after_reset(session, bundle)


@pytest.mark.parametrize("other_rows", [[[1, 8, 9]], [[1, 8, 9], [1, 8, 10]]])
def test_a_generation_notices_a_reset_that_leads_to_the_same_position(
    session: Session, other_rows: list[list[int]]
) -> None:
    ids: Iterator[int] = session.generate([1, 5, 7], max_new_tokens=4, stop_ids=())
    next(ids)
    session.reset()
    session.forward(other_rows)
    with pytest.raises(SessionError, match="fed or reset while a generation was running"):
        next(ids)


def test_a_bundle_named_by_a_relative_path_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy_bundle(tmp_path / "bundle", tokenizer={"tokenizer.json": byte_level()})
    monkeypatch.chdir(tmp_path)
    session = load("bundle", threads=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert session.tokenizer.decode(session.tokenizer.encode("hi")) == "hi"
