"""The tokenizer of a checkpoint or bundle, whichever kind it is: text to token ids and back.

    file                                     class                      chats
    tokenizer.json (tokenizer_json.py)       JsonTokenizer              the checkpoint's Jinja template
    tekken.json (tekken.py)                  TekkenTokenizer            mistral-common, by the file's version
    tokenizer.model* (sentencepiece_model)   SentencePieceTokenizer     mistral-common, by the name or the pieces

All three keep what users write apart from control tokens: no text and no message becomes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from runtime.sentencepiece_model import SentencePieceTokenizer
from runtime.tekken import TekkenTokenizer
from runtime.tekken_file import read_tekken
from runtime.tokenizer_files import JSON_FILE, TEKKEN_FILE, needed_files
from runtime.tokenizer_json import JsonTokenizer


class Tokenizer(Protocol):
    """What sessions, generation and streaming use of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        ...

    special_tokens: dict[str, str]
    """The tokens that have a role, such as {"bos_token": "<s>"}."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, after BOS if `add_special_tokens`. Control tokens spelled in it stay ordinary text.

        Raises TokenizerError for what is not Unicode text.
        """
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a chat, such as [{"role": "user", "content": "Hi"}], BOS included.

        Raises TokenizerError where the checkpoint has no chat format and for messages that it refuses.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary have no text."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece of the vocabulary, or None."""
        ...


def open_tokenizer(files: Iterable[Path]) -> Tokenizer:
    """The tokenizer among `files`; tokenizer_files.py says which file counts when several are there.

    Raises TokenizerError when there is none or its kind cannot be decided, for damaged files, and when the package that
    reads this kind is not installed.
    """
    first, *companions = needed_files(files)
    if first.name == JSON_FILE:
        return JsonTokenizer.from_files([first, *companions])
    if first.name == TEKKEN_FILE:
        return TekkenTokenizer(first)
    return SentencePieceTokenizer(first)


def special_ids(files: Iterable[Path]) -> tuple[int | None, tuple[int, ...]]:
    """(BOS id, EOS ids) of the tokenizer among `files`, for checkpoints whose configuration does not name them.

    Either may be missing in a tokenizer.json without roles: None and (). A tekken.json is only read and checked, not
    built. Raises TokenizerError as `open_tokenizer` does.
    """
    first, *companions = needed_files(files)
    if first.name == TEKKEN_FILE:
        names = read_tekken(first).special_names
        return names.index("<s>"), (names.index("</s>"),)
    tokenizer = open_tokenizer([first, *companions])
    bos, eos = (
        tokenizer.token_to_id(tokenizer.special_tokens[role]) if role in tokenizer.special_tokens else None
        for role in ("bos_token", "eos_token")
    )
    return bos, () if eos is None else (eos,)
