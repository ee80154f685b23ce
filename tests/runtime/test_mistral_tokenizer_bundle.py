"""Bundles whose only tokenizer file is one of Mistral's own, and what is missing without the packages that read it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from runtime import TokenizerError, generate_text, load
from runtime.tokenizer import open_tokenizer
from tests.support.mistral_files import native_bundle, place, tekken_document, write_tekken

CHAT = [{"role": "user", "content": "the wind"}]


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
def test_a_bundle_with_only_a_native_file_generates(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    for owner, action in ((socket, "getaddrinfo"), (socket.socket, "connect"), (socket.socket, "connect_ex")):
        monkeypatch.setattr(owner, action, lambda *args, **_: asked.append(args))
    session = load(native_bundle(tmp_path, name), threads=1, verify=True)
    tokenizer = session.tokenizer
    for prompt in ("the wind 😀", CHAT):
        session.reset()
        stream = generate_text(session, prompt, max_new_tokens=12, temperature=1.0, seed=7, stop_ids=[])
        text = "".join(stream)
        start = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
        assert stream.result.prompt_tokens == len(start)
        assert text == stream.result.text
        whole = tokenizer.decode([*start, *stream.result.token_ids])
        expected = whole[len(prompt) :] if isinstance(prompt, str) else tokenizer.decode(stream.result.token_ids)
        assert text.replace("\ufffd", "") == expected.replace("\ufffd", "")
        session.reset()
        assert list(session.generate(start, max_new_tokens=12, temperature=1.0, seed=7, stop_ids=[])) == list(
            stream.result.token_ids
        )
    assert not asked, "generation needs no network"


@pytest.mark.parametrize(
    "name,module,package",
    [
        ("tekken.json", "mistral_common.tokens.tokenizers.tekken", "mistral-common"),
        ("tokenizer.model.v3", "sentencepiece", "sentencepiece"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    file = place(tmp_path, name) if name != "tekken.json" else write_tekken(tmp_path, tekken_document())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TokenizerError, match=rf"is not installed. Install it with `pip install '{package}'`"):
        open_tokenizer([file])


def test_chats_of_a_model_need_mistral_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer([place(tmp_path, "tokenizer.model.v3")])
    monkeypatch.setitem(sys.modules, "mistral_common.tokens.tokenizers.sentencepiece", None)
    assert tokenizer.decode(tokenizer.encode("the wind")) == "the wind"
    with pytest.raises(TokenizerError, match=r"pip install 'mistral-common\[sentencepiece\]'"):
        tokenizer.encode_chat(CHAT)
