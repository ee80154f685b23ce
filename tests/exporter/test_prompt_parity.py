"""Parity on one's own prompts: right engines pass, wrong ones are named, golden files tell ties from faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest

import exporter.gate.plan
import exporter.prompt_parity
from exporter.prompt_parity import HeldPrompt, PromptParity
from reference.oracle import Oracle
from runtime.errors import CheckpointError, ExportError, InputError, ParityError, TokenizerError
from tests.support.bundles import Exported, exported
from tests.support.planted import attribute, planted

TEXT = "the wind"
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def right() -> Exported:
    return exported(num_layers=2, seed=3, tokenizer=True, vocab_size=260)


@pytest.fixture(scope="module")
def wrong(right: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def narrow(model: onnx.ModelProto) -> None:
        attribute(model, "RollingAttention", "window", 1).i -= 1

    return planted(right.bundle, tmp_path_factory.mktemp("planted") / "wrong", narrow)


@pytest.fixture(scope="module")
def parity(right: Exported) -> PromptParity:
    return PromptParity(right.bundle)


def test_prompts_of_all_kinds_hold(parity: PromptParity) -> None:
    held = parity.check([TEXT, [5, 6, 7], CHAT, TEXT], max_new_tokens=12)
    assert all(one.passed for one in held)
    text, ids, chat, again = held
    assert ids.prompt_ids == (5, 6, 7)
    assert len(chat.prompt_ids) > len("hi")
    assert again is text
    for one in held:
        count = len(one.prompt_ids) + len(one.new_ids)
        assert one.positions == tuple(range(count))
        assert 0 < max(one.errors) <= min(one.allowed)


def test_what_was_computed_is_kept(right: Exported) -> None:
    parity = PromptParity(right.bundle)
    with mock.patch.object(Oracle, "logits", autospec=True, side_effect=Oracle.logits) as reference:
        parity.check([[5, 6], [7, 8]], max_new_tokens=3)
        once = reference.call_count
        assert once == 2, "the truth and the reference's own error, for both prompts in one pass each"
        parity.check([[7, 8]], max_new_tokens=3)
        assert reference.call_count == once
        parity.check([[7, 8]], max_new_tokens=4)
        assert reference.call_count == 2 * once


def test_prompts_alone(parity: PromptParity) -> None:
    (held,) = parity.check([[5, 6, 7, 8, 9, 10, 11]], max_new_tokens=0)
    assert held.new_ids == ()
    assert len(held.errors) == 7


def test_long_prompts_are_compared_in_part(parity: PromptParity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.gate.plan, "MOST_TRUTH_BYTES", 8 * 260 * 20)
    (held,) = parity.check([[int(token) for token in np.arange(100) % 97 + 4]], max_new_tokens=5)
    count = len(held.prompt_ids) + len(held.new_ids)
    assert 11 <= len(held.positions) <= 20
    assert held.positions[0] == 0
    assert set(range(count - 10, count)) <= set(held.positions)


def test_a_wrong_engine_is_named(right: Exported, wrong: Path) -> None:
    parity = PromptParity(wrong, right.checkpoint)
    with pytest.raises(ParityError) as caught:
        parity.check(["the wind blows", [5]], max_new_tokens=1)
    text = str(caught.value)
    assert text.startswith("1 of 2 prompts are beyond the error budget:\n  'the wind blows': an error of ")
    assert "in the prompt (token '" in text


def test_requests_that_make_no_sense(parity: PromptParity) -> None:
    for prompts in ("", "a text alone"):  # a text is a sequence as well
        with pytest.raises(InputError, match="a list of prompts"):
            parity.check(prompts)
    with pytest.raises(InputError, match="a list of prompts"):
        parity.check([])
    with pytest.raises(InputError):
        parity.check([[]])
    with pytest.raises(InputError):
        parity.check([[9999]])


@pytest.mark.parametrize(
    "prompts",
    [
        5,
        None,
        b"ab",
        {"role": "user", "content": "hi"},
        [5, 6, 7],
        CHAT,
        [None],
        [b"ab"],
        [["a", "b"]],
        [[*CHAT, 5]],
        [[True]],
        [[1.5]],
        iter(()),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(parity: PromptParity, prompts: Any) -> None:
    with pytest.raises(InputError, match=r"a list of prompts|is no prompt"):
        parity.check(prompts, max_new_tokens=1)


def test_prompts_may_be_arrays_and_come_from_a_generator(parity: PromptParity, tmp_path: Path) -> None:
    array: Any = np.array([5, 6, 7])
    (one,) = parity.check(iter([array]), max_new_tokens=2)  # type: ignore[arg-type]
    assert one.prompt_ids == (5, 6, 7)
    parity.golden(tmp_path / "array.json", array, max_new_tokens=2, update=True)
    assert json.loads((tmp_path / "array.json").read_text())["prompt"] == [5, 6, 7]


@pytest.mark.parametrize("count", [-1, 1.5, None, True])
def test_numbers_of_tokens_that_are_none(parity: PromptParity, tmp_path: Path, count: Any) -> None:
    with pytest.raises(InputError, match="max_new_tokens must be an integer >= 0"):
        parity.check([[5]], max_new_tokens=count)
    for least in (count, 0):  # nothing written could never differ
        with pytest.raises(InputError, match="max_new_tokens must be an integer >= 1"):
            parity.golden(tmp_path / "wind.json", [5], max_new_tokens=least, update=True)


def test_a_golden_file_is_of_one_prompt(right: Exported, tmp_path: Path) -> None:
    file, parity = tmp_path / "wind.json", PromptParity(right.bundle)
    parity.golden(file, [5, 6, 7], max_new_tokens=2, update=True)
    written = file.read_bytes()
    for prompt, count in (([5, 6, 8], 2), ([5, 6, 7], 3)):
        for update in (True, False):
            with pytest.raises(InputError, match="the golden file of another prompt already"):
                parity.golden(file, prompt, max_new_tokens=count, update=update)
    assert file.read_bytes() == written
    assert parity.golden(file, [5, 6, 7], max_new_tokens=2) is None


def test_golden_files_that_cannot_be_written(parity: PromptParity, tmp_path: Path) -> None:
    (tmp_path / "golden").touch()
    with pytest.raises(ExportError, match=r"The golden file .* cannot be written"):
        parity.golden(tmp_path / "golden" / "wind.json", [5], max_new_tokens=1, update=True)
    damaged = tmp_path / "wind.json"
    damaged.write_bytes(b"\xff\xfe")
    parity.golden(damaged, [5], max_new_tokens=1, update=True)
    assert parity.golden(damaged, [5], max_new_tokens=1) is None


def test_without_a_tokenizer_and_without_the_checkpoint(tmp_path: Path) -> None:
    case = exported(num_layers=1, seed=5)
    with pytest.raises(TokenizerError):
        PromptParity(case.bundle).check([TEXT])
    (held,) = PromptParity(case.bundle).check([[5, 6]], max_new_tokens=2)
    assert held.passed
    with pytest.raises(CheckpointError):
        PromptParity(case.bundle, tmp_path).check([[5, 6]])


def test_a_golden_file_is_written_once_and_then_holds(parity: PromptParity, tmp_path: Path) -> None:
    file = tmp_path / "golden" / "wind.json"
    with pytest.raises(InputError, match=r"There is no golden file .* --cierzo-update-golden"):
        parity.golden(file, TEXT)
    assert parity.golden(file, TEXT, max_new_tokens=9, update=True) is None
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["prompt"] == TEXT
    assert 1 <= len(document["new_ids"]) <= 9
    written = file.stat().st_mtime_ns
    parity.golden(file, TEXT, max_new_tokens=9, update=True)
    assert file.stat().st_mtime_ns == written
    with mock.patch.object(Oracle, "logits", side_effect=AssertionError("nothing differs: no reference is needed")):
        assert parity.golden(file, TEXT, max_new_tokens=9) is None


def changed(parity: PromptParity, file: Path, at: int, by: int) -> None:
    """A golden file of [5, 6, 7] with one other token."""
    parity.golden(file, [5, 6, 7], max_new_tokens=8, update=True)
    document = json.loads(file.read_text())
    document["new_ids"][at] = (document["new_ids"][at] + by) % 260
    file.write_text(json.dumps(document))


def test_a_golden_file_that_is_wrong_is_said_to_be(parity: PromptParity, tmp_path: Path) -> None:
    file = tmp_path / "wind.json"
    changed(parity, file, 2, 7)
    with pytest.raises(ParityError) as caught:
        parity.golden(file, [5, 6, 7], max_new_tokens=8)
    text = str(caught.value)
    assert "wind.json and the engine differ from new token 2 on" in text
    assert "The engine is right" in text
    assert "--cierzo-update-golden" in text


def test_an_engine_that_is_wrong_is_said_to_be(
    parity: PromptParity, right: Exported, wrong: Path, tmp_path: Path
) -> None:
    file = tmp_path / "wind.json"
    other = PromptParity(wrong, right.checkpoint)
    failures: list[str] = []
    for seed in range(20):  # until a prompt on which the fault changes a token
        prompt = [int(token) for token in np.random.default_rng(seed).integers(4, 260, 9)]
        parity.golden(file, prompt, max_new_tokens=20, update=True)
        try:
            assert other.golden(file, prompt, max_new_tokens=20) is None
        except ParityError as error:
            failures.append(str(error))
            break
    assert "`cierzo bisect`" in failures[0]
    assert "it would be a near-tie" in failures[0]
    with pytest.raises(ParityError, match="beyond the error budget"):
        other.golden(tmp_path / "new.json", prompt, max_new_tokens=20, update=True)
    assert not (tmp_path / "new.json").exists(), "what is wrong is never stored"


def test_a_near_tie_is_let_pass(parity: PromptParity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so wide a notion of a tie every token is nearly tied."""
    file = tmp_path / "wind.json"
    changed(parity, file, 3, 1)
    monkeypatch.setattr(exporter.prompt_parity, "NEAR_TIE", 1e9)
    assert parity.golden(file, [5, 6, 7], max_new_tokens=8) == 3


def test_a_shorter_continuation_is_a_difference_too(parity: PromptParity, tmp_path: Path) -> None:
    file = tmp_path / "wind.json"
    parity.golden(file, [5, 6, 7], max_new_tokens=8, update=True)
    document = json.loads(file.read_text())
    document["new_ids"] = document["new_ids"][:4]
    file.write_text(json.dumps(document))
    with pytest.raises(ParityError, match="ends after 4 new tokens"):
        parity.golden(file, [5, 6, 7], max_new_tokens=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cierzo_golden": 2}, "not a golden file of this version"),
        ({"new_ids": "text"}, "not a golden file of this version"),
        ({"new_ids": [True]}, "not a golden file of this version"),
        ({"prompt_ids": [5, 6]}, "of another prompt, tokenizer or number of tokens"),
        ({"max_new_tokens": 9}, "of another prompt, tokenizer or number of tokens"),
    ],
)
def test_golden_files_that_do_not_fit(
    parity: PromptParity, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "wind.json"
    parity.golden(file, [5, 6, 7], max_new_tokens=8, update=True)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        parity.golden(file, [5, 6, 7], max_new_tokens=8)


def test_the_worst_position_is_that_nearest_to_its_own_budget() -> None:
    held = HeldPrompt((1,), (2, 3), (0, 1, 2), (1.0, 0.5, float("inf")), (4.0, 1.0, 1.0))
    assert held.worst == 2
    assert not held.passed
    assert HeldPrompt((1,), (2,), (0, 1), (1.0, 0.5), (4.0, 1.0)).worst == 1
