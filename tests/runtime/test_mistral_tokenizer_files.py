"""Which tokenizer file counts, what its name and pieces say, and damaged files."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from runtime import TokenizerError
from runtime.sentencepiece_model import SentencePieceTokenizer
from runtime.tekken import TekkenTokenizer
from runtime.tokenizer import open_tokenizer, special_ids
from runtime.tokenizer_files import TOKENIZER_FILES, needed_files
from runtime.tokenizer_json import JsonTokenizer
from tests.support.mistral_files import PUBLISHED, place, tekken_document, write_tekken
from tests.support.toy_tokenizers import byte_level, config_json

NATIVE = [name for name in PUBLISHED if name != "tokenizer.model.v7m1"]
CHAT = [{"role": "user", "content": "the wind"}]


@pytest.fixture
def everything(tmp_path: Path) -> dict[str, Path]:
    """All kinds of files at once."""
    files = {name: place(tmp_path, name, source) for name, source in [("tokenizer.model", "tokenizer.model.v3")]}
    files["tokenizer.model.v3"] = place(tmp_path, "tokenizer.model.v3")
    files["tekken.json"] = write_tekken(tmp_path, tekken_document())
    for name, text in {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": config_json(),
        "chat_template.jinja": "{{ 'hi' }}",
    }.items():
        files[name] = tmp_path / name
        files[name].write_text(text, encoding="utf-8")
    assert set(files) <= set(TOKENIZER_FILES)
    return files


def test_the_order_of_the_kinds(everything: dict[str, Path]) -> None:
    files = dict(everything)
    assert isinstance(open_tokenizer(files.values()), JsonTokenizer)
    names = [file.name for file in needed_files(files.values())]
    assert names == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    del files["tokenizer.json"]
    assert isinstance(open_tokenizer(files.values()), TekkenTokenizer)
    assert needed_files(files.values()) == (files["tekken.json"],)
    del files["tekken.json"]
    model = open_tokenizer(files.values())
    assert isinstance(model, SentencePieceTokenizer)
    assert needed_files(files.values()) == (files["tokenizer.model.v3"],), "the same bytes, and a name that says more"
    assert model.versions == ("v3",)
    del files["tokenizer.model.v3"], files["tokenizer.model"]
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json, tekken\.json or tokenizer\.model"):
        open_tokenizer(files.values())


def test_a_template_beside_a_native_file_is_not_read(everything: dict[str, Path]) -> None:
    files = [everything["tekken.json"], everything["chat_template.jinja"], everything["tokenizer_config.json"]]
    assert open_tokenizer(files).encode_chat(CHAT) == open_tokenizer(files[:1]).encode_chat(CHAT)


def test_models_that_disagree_are_refused(tmp_path: Path) -> None:
    old, new = place(tmp_path, "tokenizer.model", "tokenizer.model.v1"), place(tmp_path, "tokenizer.model.v3")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model and tokenizer\.model\.v3 differ in their content"):
        open_tokenizer([old, new])
    two = [place(tmp_path, "tokenizer.model.v2"), place(tmp_path, "tokenizer.model.v3", "tokenizer.model.v2")]
    with pytest.raises(TokenizerError, match="differ in their version"):
        open_tokenizer(two)
    same = [place(tmp_path, "tokenizer.model.v7"), place(tmp_path, "tokenizer.model.v7m1")]
    tokenizer = open_tokenizer(same)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.versions == ("v7",)


@pytest.mark.parametrize(
    "source,versions",
    [
        ("tokenizer.model.v1", ("v1",)),
        ("tokenizer.model.v2", ("v2", "v3")),
        ("tokenizer.model.v3", ("v3",)),
        ("tokenizer.model.v7", ("v7",)),
    ],
)
def test_the_version_of_a_plain_name_is_found_in_the_pieces(
    tmp_path: Path, source: str, versions: tuple[str, ...]
) -> None:
    assert SentencePieceTokenizer(place(tmp_path, "tokenizer.model", source)).versions == versions
    assert SentencePieceTokenizer(place(tmp_path, source)).versions == (source[-2:],)


def test_an_empty_model_is_called_empty(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model.v3"
    file.touch()
    with pytest.raises(TokenizerError, match=r"tokenizer\.model\.v3 is empty"):
        open_tokenizer([file])


def test_a_version_that_the_pieces_contradict_is_refused(tmp_path: Path) -> None:
    # Mistral 7B v0.3 ships these pieces under this name.
    assert SentencePieceTokenizer(place(tmp_path, "tokenizer.model.v3", "tokenizer.model.v2")).versions == ("v3",)
    with pytest.raises(TokenizerError, match=r"says version v3, but its model has no control piece \[/AVAILABLE"):
        SentencePieceTokenizer(place(tmp_path, "tokenizer.model.v3", "tokenizer.model.v1"))
    with pytest.raises(TokenizerError, match=r"says version v7, but its model has no control piece \[/SYSTEM_PROMPT"):
        SentencePieceTokenizer(place(tmp_path, "tokenizer.model.v7", "tokenizer.model.v3"))
    with pytest.raises(TokenizerError, match=r"says version v1, but its model has a control piece \[INST\]"):
        SentencePieceTokenizer(place(tmp_path, "tokenizer.model.v1", "tokenizer.model.v2"))


def test_pieces_of_another_family_encode_text_but_no_chat(tmp_path: Path) -> None:
    content = PUBLISHED["tokenizer.model.v1"].read_bytes()
    assert content.count("▁Valley".encode()) == 1
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content.replace("▁Valley".encode(), "▁Velley".encode()))
    tokenizer = open_tokenizer([file])
    assert tokenizer.decode(tokenizer.encode("the wind")) == "the wind"
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match=r"which chat format.*tokenizer\.model\.v1"):
        tokenizer.encode_chat(CHAT)
    stated = open_tokenizer([file.rename(tmp_path / "tokenizer.model.v1")])
    assert stated.encode_chat(CHAT) == open_tokenizer([place(tmp_path, "tokenizer.model.v1")]).encode_chat(CHAT)


def test_special_ids(tmp_path: Path, everything: dict[str, Path]) -> None:
    assert special_ids(everything.values()) == (1, (2,))
    assert special_ids([everything["tokenizer.json"]]) == (None, ())
    for name in NATIVE:
        assert special_ids([place(tmp_path, name)]) == (1, (2,))
    moved = tekken_document()
    names = ["</s>", "<unk>", "<pad>", "<s>"]
    moved["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    file = write_tekken(tmp_path, moved)
    assert special_ids([file]) == (3, (0,))
    assert open_tokenizer([file]).encode("")[:1] == [3]
    with pytest.raises(TokenizerError, match="no tokenizer"):
        special_ids([])


def damaged(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(document)
    at = changed
    for key in path[:-1]:
        at = at[key]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    "path,value,words",
    [
        (("config",), KeyError, "no `config`"),
        (("config", "version"), KeyError, "its version is None"),
        (("config", "version"), 3, "its version is 3"),
        (("config", "version"), "v³", "its version is"),
        (("config", "version"), "v99", "version v99, which the installed mistral-common does not know"),
        (("config", "pattern"), KeyError, "pattern` is not a text"),
        (("config", "pattern"), "(", "cannot be loaded: "),
        (("config", "pattern"), "x", "drops part of a text"),
        (("config", "default_num_special_tokens"), 10**15, "not a whole number from 33 to 65536"),
        (("config", "default_num_special_tokens"), True, "not a whole number"),
        (("config", "default_num_special_tokens"), 3, "not a whole number"),
        (("config", "default_vocab_size"), 10**15, "not a whole number from 296 to 303"),
        (("config", "default_vocab_size"), 40, "not a whole number"),
        (("config", "default_vocab_size"), "303", "not a whole number"),
        (("vocab",), KeyError, "`vocab` is not a list"),
        (("vocab", 300 - 40, "token_bytes"), "@@@=", "260 are not base64"),
        (("vocab", 260, "token_bytes"), "dGg", "260 are not base64"),
        (("vocab", 260, "token_bytes"), 5, "260 are not base64"),
        (("vocab", 260, "token_bytes"), "ä", "260 are not base64"),
        (("vocab", 260, "token_bytes"), "", "260 has no bytes of its own"),
        (("vocab", 260, "token_bytes"), "dGg=", "260 has no bytes of its own"),
        (("vocab", 7, "token_bytes"), "CA==", "7 is not the single byte 7"),
        (("vocab", 260, "rank"), 261, "260 has the rank 261"),
        (("vocab", 260, "token_str"), KeyError, "260 is not an object with"),
        (("vocab", 260), None, "260 is not an object with"),
        (("special_tokens",), {}, "`special_tokens` is not a list"),
        (("special_tokens", 2), KeyError, "special token 2 has the rank 3"),
        (("special_tokens", 2, "token_str"), "<s>", "special token 2 has no text of its own"),
        (("special_tokens", 2, "token_str"), "<t>", "lack <s> or </s>"),
        (("special_tokens", 2, "token_str"), "<SPECIAL_39>", "lack <s> or </s>"),
        (("special_tokens", 9, "token_str"), "<SPECIAL_39>", "cannot be loaded"),
    ],
)
def test_a_damaged_tekken_file_is_refused(tmp_path: Path, path: tuple[Any, ...], value: Any, words: str) -> None:
    file = write_tekken(tmp_path, damaged(tekken_document(), path, value))
    with pytest.raises(TokenizerError, match=words) as caught:
        open_tokenizer([file])
    assert len(str(caught.value)) < 600


def test_a_tekken_file_without_its_list_of_control_tokens(tmp_path: Path) -> None:
    old = open_tokenizer([write_tekken(tmp_path, tekken_document("v7", listed=False))])
    assert old.token_to_id("[TOOL_CONTENT]") == 19
    for version in ("v11", "v" + "9" * 6000):
        with pytest.raises(TokenizerError, match="special_tokens`, which version"):
            open_tokenizer([write_tekken(tmp_path, tekken_document(version, listed=False))])


def test_a_tekken_file_that_lacks_what_its_chats_need(tmp_path: Path) -> None:
    document = tekken_document()
    document["special_tokens"] = document["special_tokens"][:3]
    tokenizer = open_tokenizer([write_tekken(tmp_path, document)])
    assert tokenizer.decode(tokenizer.encode("the wind")) == "the wind"
    with pytest.raises(TokenizerError, match=r"chat format of the tokenizer cannot be used: .*\[INST\]"):
        tokenizer.encode_chat(CHAT)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tekken.json", "tokenizer.model", "tokenizer.model.v3"):
        file = tmp_path / name
        for content in (b"", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"config": 1e999}', os.urandom(500)):
            file.write_bytes(content)
            with pytest.raises(TokenizerError):
                open_tokenizer([file])
        file.unlink()
        with pytest.raises(TokenizerError, match="cannot be read"):
            open_tokenizer([file])
        os.mkfifo(file)
        with pytest.raises(TokenizerError, match="cannot be read"):
            open_tokenizer([file])
        file.unlink()
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
        with pytest.raises(TokenizerError, match="more than 256 MiB"):
            open_tokenizer([file])
        file.unlink()


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 20])):
        at = draw.randrange(len(changed))
        match draw.randrange(4):
            case 0:
                changed[at] = draw.randrange(256)
            case 1:
                del changed[at : at + draw.randint(1, 9)]
            case 2:
                changed[at:at] = draw.randbytes(draw.randint(1, 9))
            case _ if len(changed) > 1000 and draw.random() < 0.2:
                del changed[at:]
    return bytes(changed)


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3", "tokenizer.model"])
def test_mutated_files_open_or_are_refused(tmp_path: Path, name: str) -> None:
    """Whatever a mutated file holds: a tokenizer that works, or one paragraph of ours."""
    content = (
        json.dumps(tekken_document()).encode()
        if name == "tekken.json"
        else PUBLISHED["tokenizer.model.v3"].read_bytes()
    )
    draw, file, refused = random.Random(5), tmp_path / name, list[str]()
    for _ in range(150):
        file.write_bytes(mutated(content, draw))
        try:
            tokenizer = open_tokenizer([file])
            tokenizer.decode(tokenizer.encode("the wind 😀\n"))
            tokenizer.decode(range(0, tokenizer.vocab_size, 41), skip_special_tokens=False)
            tokenizer.encode_chat(CHAT)
        except TokenizerError as error:
            refused.append(str(error))
    assert 50 < len(refused) < 150
    assert max(map(len, refused)) < 700
