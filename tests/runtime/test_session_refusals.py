"""What a session refuses, and that a refusal leaves its state alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime import BackendError, ContextError, InputError, Session, SessionError, TokenizerError, load
from runtime.position_limits import MAX_POSITION
from tests.support.toy_bundle import ToyModel, write_toy_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"), ToyModel(windows=(4, None), chunk=3, context=10))


@pytest.fixture
def session(bundle: Path) -> Session:
    return load(bundle, threads=1)


BAD_IDS: dict[str, tuple[Any, str]] = {
    "too large": ([[1, 2], [3, 37]], "Row 1, position 1: the token id 37 is outside the vocabulary.* 0 to 36"),
    "negative": ([0, -1], "Row 0, position 1: the token id -1"),
    "huge unsigned": (np.array([2**64 - 1], dtype=np.uint64), "the token id 18446744073709551615"),
    "beyond 64 bits": ([2**70], "is outside the vocabulary"),
    "floats": (np.array([1.0, 2.0]), "must be integers"),
    "floats in a list": ([1, 2.0], "must be integers"),
    "booleans": (np.array([True, False]), "must be integers"),
    "a boolean among integers": ([1, True], "Row 0, position 1: True is a boolean"),
    "text": ("hello", r"must have the shape \[B, T\] or \[T\]"),
    "rows of text": (["ab"], "Row 0 .* has 0 dimensions"),
    "no list": ([], "prompt is empty"),
    "no tokens": (np.zeros((2, 0), dtype=np.int64), "prompt is empty"),
    "all rows empty": ([[], []], "prompt is empty"),
    "one empty prompt": ([[1], []], "Row 1 is an empty prompt"),
    "three dimensions": (np.zeros((1, 1, 1), dtype=np.int64), "3 dimensions"),
    "a scalar": (np.int64(3), "0 dimensions"),
    "three dimensions in lists": ([[[1]]], "2 dimensions"),
    "an uneven third dimension": ([[[1], [2, 3]]], "not one row of integers"),
    "a tensor that numpy cannot read": (torch.tensor([1.0], dtype=torch.bfloat16), "cannot be read"),
    "a mixture": ([1, [2]], "not a mixture"),
    "too many rows": ([[1]] * 5, "exported for at most 4.*max_batch=5"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_bad_ids_are_refused(session: Session, name: str) -> None:
    token_ids, message = BAD_IDS[name]
    with pytest.raises(InputError, match=message):
        session.forward(token_ids)
    assert session.position.tolist() == [0]
    assert session.forward([1]).shape == (1, 1, 37)


def test_a_change_of_batch_in_mid_text_is_refused(session: Session) -> None:
    session.forward([[1], [2]])
    with pytest.raises(InputError, match="1 rows, but this session is in the middle of 2"):
        session.forward([3])
    session.reset()
    session.forward([3])


def test_all_rows_idle_is_refused(session: Session) -> None:
    session.forward([[1], [2]])
    with pytest.raises(InputError, match="empty"):
        session.forward([[], []])


def test_unknown_padding_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match="middle"):
        session.forward([1], padding="middle")  # type: ignore[arg-type]


def test_the_context_is_checked_before_any_step(session: Session) -> None:
    session.forward([[1] * 6, [2] * 2])
    with pytest.raises(ContextError, match=r"Row 0 holds 6 tokens and 5 more would make 11.*room for 10.*context=11"):
        session.forward([[1] * 5, [2] * 5])
    assert session.position.tolist() == [6, 2]
    after_refusal = session.forward([[3], [4]])
    session.reset()
    session.forward([[1] * 6, [2] * 2])
    assert np.array_equal(session.forward([[3], [4]]), after_refusal)


def test_the_context_can_be_filled_exactly(session: Session) -> None:
    session.forward([1] * 10)
    with pytest.raises(ContextError):
        session.forward([1])


def test_generation_must_have_room_before_it_begins(session: Session) -> None:
    assert len(list(session.generate([1] * 6, max_new_tokens=5, stop_ids=[]))) == 5  # the fifth is not fed
    session.reset()
    with pytest.raises(ContextError, match="6 more and then 5 generated ones would make 11"):
        session.generate([1] * 6, max_new_tokens=6)
    assert session.position.tolist() == [0]


def test_positions_end_where_float32_cannot_count(tmp_path: Path) -> None:
    session = load(write_toy_bundle(tmp_path), threads=1)
    session.forward([1])
    session._position_B[:] = MAX_POSITION - 2  # feeding sixteen million tokens would take a while
    session.forward([1, 2])
    with pytest.raises(ContextError, match="cannot be told apart"):
        session.forward([1])
    session.reset()
    session.forward([1])


def test_a_failed_step_asks_for_a_reset(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = session.forward([1, 2, 3])

    def fail(*_: object) -> None:
        raise BackendError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session._engine, "step", fail)
        with pytest.raises(BackendError, match="out of memory"):
            session.forward([4])
    with pytest.raises(SessionError, match="reset"):
        session.forward([4])
    session.reset()
    assert np.array_equal(session.forward([1, 2, 3]), expected)


def test_a_bundle_without_tokenizer_says_so(session: Session) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        _ = session.tokenizer
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        session.generate([1], stop_strings=["x"], max_new_tokens=2)


def test_nothing_is_fed_past_the_position_where_dynamic_rope_begins(tmp_path: Path) -> None:
    session = load(write_toy_bundle(tmp_path / "bundle", ToyModel(position_limit=10)), threads=1)
    session.forward([1] * 8)
    with pytest.raises(ContextError, match="this model has dynamic RoPE: from position 10 on its frequencies depend"):
        session.forward([1] * 3)
    with pytest.raises(ContextError, match="2 more and then 1 generated ones would make 11"):
        session.generate([1, 1], max_new_tokens=2)
    assert session.position.tolist() == [8]
    assert session.forward([1] * 2).shape == (1, 2, 37)
    with pytest.raises(ContextError, match="dynamic RoPE"):
        session.forward([1])
