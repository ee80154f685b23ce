"""Text piece by piece: whole characters, right spaces, and stop strings across any border."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from runtime.streaming import REPLACEMENT, IncrementalDetokenizer, StopStringFilter, TextStreamer
from runtime.tokenizer_json import JsonTokenizer
from tests.support.toy_tokenizers import KINDS, config_json

TEXTS = [
    "the wind of the valley",
    "emoji 😀👩‍🚀🇪🇸 and 日本語 text",
    "  two spaces  inside ",
    "ñandú, Zürich, naïve café",
    "line\nbreaks\n\nand\ttabs",
    "😀",
    "日",
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> JsonTokenizer:
    return JsonTokenizer(KINDS[request.param](), json.loads(config_json()), {})


def byte_ids(tokenizer: JsonTokenizer, data: bytes) -> list[int]:
    """One id per byte, in either kind of vocabulary."""
    ids = []
    for byte in data:
        single = tokenizer.token_to_id(f"<0x{byte:02X}>")
        if single is None:
            (single,) = (i for i in range(5, 261) if tokenizer._tokenizer.id_to_token(i) == BYTE_LEVEL[byte])
        ids.append(single)
    return ids


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes: printable ones stand for themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level_alphabet()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer: JsonTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_every_prefix_is_a_prefix_of_the_text(tokenizer: JsonTokenizer, text: str) -> None:
    data = text.encode()
    stream = IncrementalDetokenizer(tokenizer)
    shown = ""
    # At the beginning of a text a sentencepiece-like decoder drops one space.
    dropped = "" if tokenizer.decode(byte_ids(tokenizer, b" ")) else " "
    for count, token_id in enumerate(byte_ids(tokenizer, data), start=1):
        shown += stream.push(token_id)
        assert shown == data[:count].decode(errors="ignore").removeprefix(dropped)
    assert stream.flush() == ""


def test_a_continued_text_keeps_its_first_space(tokenizer: JsonTokenizer) -> None:
    whole = tokenizer.encode("the wind of the valley")
    stream = IncrementalDetokenizer(tokenizer, whole[:2])
    rest = "".join(stream.push(token_id) for token_id in whole[2:]) + stream.flush()
    assert tokenizer.decode(whole[:2]) + rest == "the wind of the valley"


def test_special_tokens_are_silent(tokenizer: JsonTokenizer) -> None:
    ids = tokenizer.encode("the wind")
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(stream.push(token_id) for token_id in [*ids, end, *ids[1:]]) == tokenizer.decode([*ids, *ids[1:]])


def test_broken_bytes_do_not_swallow_what_follows(tokenizer: JsonTokenizer) -> None:
    data = "日".encode() + b"\xff" + "本".encode() + b"\xf0\x9f" + b"x"
    stream = IncrementalDetokenizer(tokenizer)
    shown = "".join(stream.push(token_id) for token_id in byte_ids(tokenizer, data)) + stream.flush()
    assert shown.replace(REPLACEMENT, "") == "日本x"
    assert shown.startswith("日" + REPLACEMENT + "本" + REPLACEMENT)


def test_endless_broken_bytes_are_let_go(tokenizer: JsonTokenizer) -> None:
    stream = IncrementalDetokenizer(tokenizer)
    shown = "".join(stream.push(token_id) for token_id in byte_ids(tokenizer, b"\xff" * 50))
    assert len(shown) >= 46
    assert len(stream._held) < 4
    assert shown + stream.flush() == REPLACEMENT * 50


def test_a_character_cut_off_by_the_end_shows_at_flush(tokenizer: JsonTokenizer) -> None:
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.push(token_id) for token_id in byte_ids(tokenizer, b"a\xf0\x9f")] == ["a", "", ""]
    assert set(stream.flush()) == {REPLACEMENT}
    assert stream.flush() == ""


@pytest.mark.parametrize(
    "pieces,stops,shown,stopped_by",
    [
        (["hello END more"], ["END"], ["hello "], "END"),
        (["hello E", "N", "D more"], ["END"], ["hello ", "", ""], "END"),
        (["E", "E", "EN", "D"], ["END"], ["", "E", "E", ""], "END"),
        (["a", "a", "b", "c"], ["aab", "c"], ["", "", ""], "aab"),
        (["EN", "x"], ["END"], ["", "ENx"], None),
        (["abab", "abc"], ["ababc"], ["", "ab"], "ababc"),
        (["one\n", "\ntwo"], ["\n\n"], ["one", ""], "\n\n"),
        (["text"], [], ["text"], None),
        (["x😀", "y"], ["😀y"], ["x", ""], "😀y"),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], shown: list[str], stopped_by: str | None) -> None:
    stream = StopStringFilter(stops)
    out = []
    for piece in pieces:
        if stream.stopped_by is None:
            out.append(stream.push(piece))
    assert out == shown
    assert stream.stopped_by == stopped_by
    assert stream.push("after") == ("" if stopped_by else "after")


def test_what_was_held_back_in_vain_comes_at_flush() -> None:
    stream = StopStringFilter(["END"])
    assert stream.push("the EN") == "the "
    assert stream.flush() == "EN"
    assert stream.flush() == ""


def test_borders_make_no_difference() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices("abc", k=draw.randint(1, 12)))
        stops = ["".join(draw.choices("abc", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        outcomes = set()
        for _ in range(4):
            stream, shown, rest = StopStringFilter(stops), "", text
            while rest and stream.stopped_by is None:
                size = draw.randint(1, 4)
                shown += stream.push(rest[:size])
                rest = rest[size:]
            outcomes.add((shown + stream.flush(), stream.stopped_by))
        assert len(outcomes) == 1, (text, stops, outcomes)
        ((shown, stopped_by),) = outcomes
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if ends:
            assert stopped_by is not None
            assert len(shown) + len(stopped_by) == min(ends)
            assert text.startswith(shown + stopped_by)
        else:
            assert (shown, stopped_by) == (text, None)


def test_text_and_stops_together(tokenizer: JsonTokenizer) -> None:
    ids = tokenizer.encode("the wind of the valley blows 😀 cold", add_special_tokens=False)
    stream = TextStreamer(tokenizer, [], ["s 😀"])
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        if stream.stopped:
            break
    assert shown + stream.flush() == "the wind of the valley blow"
    whole = TextStreamer(tokenizer, [], ["s 😀!"])
    assert "".join(whole.push(token_id) for token_id in ids) + whole.flush() == "the wind of the valley blows 😀 cold"
    assert not whole.stopped


def test_many_tokens_without_text_do_not_hide_the_space_behind_them(tokenizer: JsonTokenizer) -> None:
    words, end = tokenizer.encode("the wind", add_special_tokens=False), tokenizer.token_to_id("</s>")
    assert end is not None
    ids = [*words, *[end] * 20, *words]
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


class HalfCharacters:
    """Decodes bytes as a byte-level vocabulary would whose tokens may end amid a character; counts what it decodes."""

    TOKENS = (b" \xd0", b"\xb0", b"\xf0\x9f", b"\x98\x80", b"a\xe2\x82", b"\xac ", b"x")

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return b"".join(self.TOKENS[token_id] for token_id in token_ids).decode(errors="replace")


def test_characters_that_are_never_completed_do_not_pile_up() -> None:
    decoder = HalfCharacters()
    stream = IncrementalDetokenizer(decoder)
    ids = [0] * 1000 + [1]
    assert "".join(map(stream.push, ids)) + stream.flush() == " \ufffd" * 999 + " а"
    assert decoder.decoded < 100 * len(ids)


def test_half_characters_in_any_order_are_streamed_as_decoded() -> None:
    draw, decoder = random.Random(6), HalfCharacters()
    for _ in range(300):
        ids = draw.choices(range(7), [9, 1, 1, 1, 9, 1, 1], k=60)
        stream = IncrementalDetokenizer(decoder)
        assert "".join(map(stream.push, ids)) + stream.flush() == decoder.decode(ids)
