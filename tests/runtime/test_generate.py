"""The decode loop: against the oracle, in batches, in continuation, with stops, and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import InputError, Session, SessionError, generate_text, load
from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_tokenizers import CHAT_TEMPLATE, SENTENCEPIECE_PIECES, config_json, sentencepiece_like

MODEL = ToyModel(windows=(4, 6), chunk=3, seed=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"), MODEL)


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {
        "tokenizer.json": sentencepiece_like(),
        "tokenizer_config.json": config_json(),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    # Without the bytes, so that a model of random weights writes valid UTF-8.
    model = ToyModel(windows=(8,), chunk=5, vocab_size=SENTENCEPIECE_PIECES, seed=1)
    return write_toy_bundle(tmp_path_factory.mktemp("text"), model, files)


@pytest.fixture
def session(bundle: Path) -> Session:
    return load(bundle, threads=1)


@pytest.fixture
def text_session(text_bundle: Path) -> Session:
    return load(text_bundle, threads=1)


def prompt(count: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, MODEL.vocab_size, count)]


@pytest.mark.parametrize("count", [1, 3, 4, 19])
def test_greedy_equals_the_oracle(session: Session, count: int) -> None:
    expected = MODEL.greedy(prompt(count, count), 30)
    assert list(session.generate(prompt(count, count), max_new_tokens=30)) == expected
    # All but the last token have been fed.
    assert session.position.tolist() == [count + len(expected) - 1]


def test_a_batch_equals_every_prompt_alone(session: Session) -> None:
    prompts = [prompt(7, 1), prompt(1, 2), prompt(20, 3), prompt(4, 4)]
    expected = [MODEL.greedy(tokens, 25) for tokens in prompts]
    assert session.generate_batch(prompts, max_new_tokens=25) == expected


def test_finished_rows_idle_while_others_go_on(session: Session) -> None:
    prompts = [prompt(5, 5), prompt(9, 6), prompt(2, 7)]
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5, "seed": 8}
    # A stop id that ends one row early and another late.
    free = session.generate_batch(prompts, stop_ids=[], **options)
    stop = free[0][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    session.reset()
    assert session.generate_batch(prompts, stop_ids=[stop], **options) == expected
    for index, tokens in enumerate(prompts):
        session.reset()
        alone = session.generate(tokens, stop_ids=[stop], **{**options, "seed": 8 + index})
        assert list(alone) == expected[index]


def test_sampling_repeats_with_a_seed(session: Session) -> None:
    def run(seed: int) -> list[int]:
        session.reset()
        return list(session.generate([5, 6], max_new_tokens=20, temperature=1.3, top_p=0.9, seed=seed, stop_ids=[]))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_end_of_text_id_is_the_last_one(bundle: Path, tmp_path: Path) -> None:
    usual = MODEL.greedy(prompt(6, 9), 12)
    eos = usual[4]
    model = ToyModel(windows=(4, 6), chunk=3, seed=3, eos_token_ids=(eos,))
    session = load(write_toy_bundle(tmp_path, model), threads=1)
    assert list(session.generate(prompt(6, 9), max_new_tokens=12)) == usual[: usual.index(eos) + 1]
    session.reset()
    assert list(session.generate(prompt(6, 9), max_new_tokens=12, stop_ids=[])) == usual


def test_generation_continues_the_state(session: Session) -> None:
    text = prompt(12, 10)
    session.forward(text[:5])
    assert list(session.generate(text[5:], max_new_tokens=9)) == MODEL.greedy(text, 9)


def test_a_second_prompt_begins_with_the_last_token(session: Session) -> None:
    text = prompt(4, 11)
    first = list(session.generate(text, max_new_tokens=6, stop_ids=[]))
    more = prompt(3, 12)
    second = list(session.generate([first[-1], *more], max_new_tokens=6, stop_ids=[]))
    assert second == MODEL.greedy(text + first + more, 6)


def test_breaking_off_leaves_all_but_the_last_token_fed(session: Session) -> None:
    text = prompt(4, 13)
    taken: list[int] = []
    for token in session.generate(text, max_new_tokens=50, stop_ids=[]):
        taken.append(token)
        if len(taken) == 3:
            break
    assert session.position.tolist() == [4 + 2]
    assert list(session.generate([taken[-1]], max_new_tokens=5)) == MODEL.greedy(text + taken, 5)


def test_repetition_penalty_covers_prompt_and_output(session: Session) -> None:
    strong = list(session.generate([5, 6, 7], max_new_tokens=15, repetition_penalty=1e9, stop_ids=[]))
    # A huge penalty makes every seen token lose against every unseen one with a positive logit.
    assert len({5, 6, 7, *strong}) == 18
    session.reset()
    session.forward([5, 6])
    assert list(session.generate([7], max_new_tokens=15, repetition_penalty=1e9, stop_ids=[])) == strong


def test_options_and_prompts_are_checked_at_the_call(session: Session) -> None:
    with pytest.raises(InputError, match="top_k"):
        session.generate([1], top_k=0)
    with pytest.raises(InputError, match="empty"):
        session.generate([])
    with pytest.raises(InputError, match="one prompt, not 2"):
        session.generate([[1], [2]])
    with pytest.raises(TypeError, match="temprature"):
        session.generate([1], temprature=1.0)
    with pytest.raises(InputError, match="Row 1 is an empty prompt"):
        session.generate_batch([[1], []])
    session.forward([[1], [2]])
    with pytest.raises(InputError, match="Every prompt"):
        session.generate_batch([[1], []])


def test_feeding_in_the_middle_of_a_generation_is_refused(session: Session) -> None:
    running = session.generate([5], max_new_tokens=10, stop_ids=[])
    next(running)
    session.forward([6])
    with pytest.raises(SessionError, match="while a generation was running"):
        next(running)


def test_text_is_the_decoded_ids(text_session: Session) -> None:
    stream = generate_text(text_session, "the wind", max_new_tokens=25, temperature=1.0, seed=3, stop_ids=[])
    pieces = list(stream)
    result = stream.result
    assert all(pieces)
    assert "".join(pieces) == result.text
    assert (len(result.token_ids), result.finish_reason) == (25, "length")
    tokenizer = text_session.tokenizer
    start = tokenizer.encode("the wind")
    assert result.prompt_tokens == len(start)
    assert "the wind" + result.text == tokenizer.decode([*start, *result.token_ids])


def test_the_result_is_there_only_at_the_end(text_session: Session) -> None:
    stream = generate_text(text_session, "the", max_new_tokens=5)
    with pytest.raises(SessionError, match="not ended"):
        _ = stream.result


def test_stop_strings_end_text_and_ids(text_session: Session) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 4, "stop_ids": []}
    free = generate_text(text_session, "the valley", **options)
    whole = "".join(free)
    stop = whole[12:16]
    text_session.reset()
    stopped = generate_text(text_session, "the valley", stop_strings=[stop], **options)
    assert "".join(stopped) == whole[: whole.index(stop)]
    assert stopped.result.finish_reason == "stop_string"
    taken = stopped.result.token_ids
    assert taken == free.result.token_ids[: len(taken)]
    text_session.reset()
    ids = text_session.tokenizer.encode("the valley")
    assert tuple(text_session.generate(ids, stop_strings=[stop], **options)) == taken
    text_session.reset()
    batch = text_session.generate_batch([ids, ids], stop_strings=[stop], **options)
    assert tuple(batch[0]) == taken


def test_a_stop_id_ends_the_text_without_its_own(text_session: Session) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5}
    free = generate_text(text_session, "a window", stop_ids=[], **options)
    list(free)
    stop_id = free.result.token_ids[6]
    expected = free.result.token_ids[: free.result.token_ids.index(stop_id)]
    text_session.reset()
    stream = generate_text(text_session, "a window", stop_ids=[stop_id], **options)
    text = "".join(stream)
    assert stream.result.finish_reason == "stop_id"
    assert stream.result.token_ids == (*expected, stop_id)
    start = text_session.tokenizer.encode("a window")
    assert "a window" + text == text_session.tokenizer.decode([*start, *expected])


def test_a_begin_of_text_is_added_only_at_the_beginning(text_session: Session) -> None:
    list(first := generate_text(text_session, "the", max_new_tokens=1))
    list(second := generate_text(text_session, "the", max_new_tokens=1))
    list(third := generate_text(text_session, "the", max_new_tokens=1, add_special_tokens=True))
    assert first.result.prompt_tokens == second.result.prompt_tokens + 1 == third.result.prompt_tokens


def test_a_chat_is_a_prompt(text_session: Session) -> None:
    messages = [{"role": "user", "content": "the text"}]
    stream = generate_text(text_session, messages, max_new_tokens=3, stop_ids=[])
    list(stream)
    expected = text_session.tokenizer.encode_chat(messages)
    assert stream.result.prompt_tokens == len(expected)
    # The reply is a text of its own, so a sentencepiece-like decoder drops its first space.
    assert stream.result.text == text_session.tokenizer.decode(stream.result.token_ids)
    with pytest.raises(InputError, match="middle of a text"):
        generate_text(text_session, messages)
    text_session.reset()
    assert tuple(text_session.generate(expected, max_new_tokens=3, stop_ids=[])) == stream.result.token_ids
