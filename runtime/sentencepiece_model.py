"""Text to token ids and back with a SentencePiece model (tokenizer.model and tokenizer.model.v1 to .v7).

Encoding and decoding are sentencepiece's; chats are mistral-common's, and these depend on the version of the format.
A name such as tokenizer.model.v3 states it. A plain tokenizer.model does not (mistral-common takes it for v1, which is
wrong for every vocabulary with control tokens), so its control pieces are looked at. Those of the published files:

    pieces                                            published as                       read as
    [SYSTEM_PROMPT] and the ones below                v7, v7m1                           v7
    [PREFIX], [IMG] and the ones below                v3 (Codestral)                     v3
    [INST], [TOOL_CALLS], …, [control_8]              v2; v3 of Mistral 7B v0.3          v2 or v3
    no [INST], and exactly the pieces of Mistral 7B   v1                                 v1
    no [INST], other pieces (Llama 2)                 not by Mistral                     no chats

v2 and v3 differ in nothing but tools, so in the third case a chat is encoded in both and refused where they differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import TokenizerError
from runtime.token_text import checked_ids, checked_text, library_errors
from runtime.tokenizer_files import read_bounded, sentencepiece_version

if TYPE_CHECKING:
    from runtime.mistral_chat import MistralChat

NEEDS = "sentencepiece"
_INSTRUCTIONS = frozenset({"[INST]", "[/INST]"})
_TOOLS = frozenset({"[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"})
_SYSTEM = frozenset({"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"})
_CONTROL_PIECES = {
    "v1": frozenset[str](),
    "v2": _INSTRUCTIONS | _TOOLS,
    "v3": _INSTRUCTIONS | _TOOLS,
    "v7": _INSTRUCTIONS | _TOOLS | _SYSTEM,
}
# SHA-256 of the 32,000 pieces of Mistral 7B v0.1, each with a zero byte behind it.
_V1_PIECES = "f713915c1abcec0a1e6b4b142e71b582125664202323622f0b480d99f21a8b8f"


class SentencePieceTokenizer:
    """A tokenizer of the kind that Mistral 7B and Mixtral have, and Llama 2 as well.

    sentencepiece never finds a control piece in a text, so "</s>" in one is four ordinary characters; that goes for
    "[INST]" too, except that v1 has no control piece for it and spells it in every chat as ordinary text.

    Raises TokenizerError for a damaged model, for a version in its name that its pieces contradict, and when the
    package sentencepiece is missing.
    """

    def __init__(self, file: Path) -> None:
        content = read_bounded(file)
        if not content:  # for which the library returns a model of no pieces
            raise TokenizerError(f"{file.name} is empty. Fetch it again.")
        with library_errors(f"{file.name} cannot be loaded", NEEDS):
            from sentencepiece import SentencePieceProcessor

            self._model = SentencePieceProcessor(model_proto=content)
            self._pieces: list[str] = [self._model.id_to_piece(i) for i in range(self._model.get_piece_size())]
            self._control = {i for i in range(len(self._pieces)) if self._model.is_control(i)}
            ids = {name: getattr(self._model, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
        if ids["bos"] not in self._control or ids["eos"] not in self._control:
            raise TokenizerError(
                f"{file.name} has no control pieces for the beginning and the end of a text, so it is not a language "
                "model's tokenizer. Fetch the file again."
            )
        self.special_tokens = {f"{name}_token": self._pieces[i] for name, i in ids.items() if i >= 0}
        self._unknown = ids["unk"]
        self._file = file
        self.versions = _versions(file, self._pieces, {self._pieces[i] for i in self._control})
        """The chat formats that the file may mean: none, one, or v2 and v3."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, control pieces included."""
        return len(self._pieces)

    @property
    def has_chat_template(self) -> bool:
        """Whether the version of the chat format is known well enough for `encode_chat`."""
        return bool(self.versions)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, after BOS if `add_special_tokens`. Raises TokenizerError for what is not Unicode text."""
        checked = checked_text(text)
        with library_errors("The text cannot be encoded", NEEDS):
            ids = [int(token_id) for token_id in self._model.encode(checked)]
        return [self._model.bos_id(), *ids] if add_special_tokens else ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a chat, as mistral-common encodes it for the file's version; see MistralChat.encode.

        Also raises TokenizerError when the version is not known, or not well enough for these messages.
        """
        if not self._chats:
            raise TokenizerError(
                f"Neither the name nor the pieces of {self._file.name} say which chat format the model was trained "
                "with. If it is one of Mistral's, give the file its name in the checkpoint (such as "
                "tokenizer.model.v1) and export again; otherwise convert it to tokenizer.json with a chat template."
            )
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools}
        first, *others = (chat.encode(messages, **options) for chat in self._chats)
        if any(other != first for other in others):
            raise TokenizerError(
                f"The pieces of {self._file.name} fit the chat formats {' and '.join(self.versions)}, which encode "
                "these messages differently (they differ in tools). Give the file its version in the checkpoint, such "
                "as tokenizer.model.v3 for Mistral 7B v0.3, and export again."
            )
        return first

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary have no text.

        The first space of the text is dropped, as it stands for the one that encoding adds.
        """
        ids = [token_id for token_id in checked_ids(token_ids) if token_id < self.vocab_size]
        with library_errors("The ids cannot be decoded", NEEDS):
            if skip_special_tokens:
                return str(self._model.decode(ids))
            texts: list[str] = []
            begun = False
            for special, group in groupby(ids, lambda i: i in self._control or i == self._unknown):
                run = list(group)
                texts.append("".join(self._pieces[i] for i in run) if special else self._text(run, begun))
                begun = begun or not special
            return "".join(texts)

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece of the vocabulary, or None."""
        token_id = int(self._model.piece_to_id(checked_text(token)))
        return token_id if self._pieces[token_id] == token else None

    def _text(self, ids: list[int], begun: bool) -> str:
        """The text of ordinary pieces, with its first space when other ordinary pieces come before it."""
        if not begun or self._anchor is None:
            return str(self._model.decode(ids))
        return str(self._model.decode([self._anchor, *ids])).removeprefix(self._model.decode([self._anchor]))

    @cached_property
    def _anchor(self) -> int | None:
        """A piece with a text of its own, to decode others behind it."""
        ordinary = (i for i in range(self.vocab_size) if i not in self._control and not self._model.is_byte(i))
        return next((i for i in ordinary if i != self._unknown and self._pieces[i].isalnum()), None)

    @cached_property
    def _chats(self) -> list[MistralChat]:
        from runtime.mistral_chat import NEEDS as CHAT_NEEDS
        from runtime.mistral_chat import MistralChat

        with library_errors(f"The chat format of {self._file.name} cannot be used", CHAT_NEEDS):
            from mistral_common.tokens.tokenizers.base import TokenizerVersion
            from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer as Library

            return [MistralChat(Library(self._file, TokenizerVersion(version))) for version in self.versions]


def _versions(file: Path, pieces: Sequence[str], control: Collection[str]) -> tuple[str, ...]:
    """The versions that the name or else the pieces allow; see the table above."""
    stated = sentencepiece_version(file)
    if stated is not None:
        missing = sorted(_CONTROL_PIECES[stated].difference(control))
        surplus = stated == "v1" and "[INST]" in control
        if missing or surplus:
            raise TokenizerError(
                f"{file.name} says version {stated}, but its model has "
                + (f"no control piece {missing[0]}" if missing else "a control piece [INST], which v1 has not")
                + ". Give the file the name that it has in the published checkpoint and export again."
            )
        return (stated,)
    known = control if isinstance(control, (set, frozenset)) else set(control)
    if known >= _CONTROL_PIECES["v7"]:
        return ("v7",)
    if known >= _CONTROL_PIECES["v3"]:
        return ("v3",) if "[PREFIX]" in known else ("v2", "v3")
    return ("v1",) if _digest(pieces) == _V1_PIECES else ()


def _digest(pieces: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{piece}\0" for piece in pieces).encode()).hexdigest()
