"""Text to token ids and back with Mistral's tekken.json, through mistral-common (and tiktoken inside it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import TokenizerError
from runtime.tekken_file import NEEDS, TekkenFile, read_tekken
from runtime.token_text import checked_ids, checked_text, library_errors

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    from runtime.mistral_chat import MistralChat

_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# Letters of both cases, digits, marks, spaces, ends of lines and punctuation: every branch of the splitting pattern.
_PROBE = "Ab cD 12\n\n  e\u0301!  日\t\r\n<s> "


class TekkenTokenizer:
    """A tokenizer of the kind that Mistral Nemo and later models have.

    Control tokens have ids of their own below the ordinary ones and no text of a user is ever compared with them, so
    "[INST]" in a text is six ordinary characters. Raises TokenizerError for a damaged file and without mistral-common.
    """

    has_chat_template = True
    """mistral-common knows the chat format of every version."""

    def __init__(self, file: Path) -> None:
        source = read_tekken(file)
        with library_errors("tekken.json cannot be loaded", NEEDS):
            self._tekken = _load(source)
        self.special_tokens = {role: name for role, name in _ROLES.items() if name in source.special_names}
        self._chat: MistralChat | None = None
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise TokenizerError(
                "tekken.json cannot be used: its `config.pattern` drops part of a text. The file is damaged; fetch it "
                "again."
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return self._tekken.n_words

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, after BOS if `add_special_tokens`.

        Raises TokenizerError for what is not Unicode text, and for texts that exhaust the splitting pattern (some
        700,000 spaces in a row).
        """
        checked = checked_text(text)
        with library_errors("The text cannot be encoded", NEEDS):
            return self._tekken.encode(checked, bos=add_special_tokens, eos=False)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a chat, as mistral-common encodes it for the file's version; see MistralChat.encode."""
        from runtime.mistral_chat import MistralChat

        if self._chat is None:
            self._chat = MistralChat(self._tekken)
        return self._chat.encode(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary have no text."""
        ids = [token_id for token_id in checked_ids(token_ids) if token_id < self.vocab_size]
        with library_errors("The ids cannot be decoded", NEEDS):
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

            policy = SpecialTokenPolicy.IGNORE if skip_special_tokens else SpecialTokenPolicy.KEEP
            return self._tekken.decode(ids, special_token_policy=policy)

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece of the vocabulary, or None."""
        if self._tekken.is_special(token):
            return self._tekken.get_special_token(token)
        data = checked_text(token).encode()
        ordinary = range(self._tekken.num_special_tokens, self.vocab_size)
        return next((i for i in ordinary if self._tekken.id_to_byte_piece(i) == data), None)


def _load(source: TekkenFile) -> Tekkenizer:
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.model_settings_builder import ModelSettingsBuilder
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    if source.version not in TokenizerVersion.__members__:
        raise TokenizerError(
            f"tekken.json is of version {source.version}, which the installed mistral-common does not know (it knows "
            f"{', '.join(TokenizerVersion.__members__)}). Update the package."
        )
    settings = source.model_settings
    vocab: Any = source.vocab
    special: Any = source.special_tokens
    return Tekkenizer(
        vocab,
        special,
        source.pattern,
        source.vocab_size,
        source.num_special,
        TokenizerVersion(source.version),
        model_settings_builder=None if settings is None else ModelSettingsBuilder.model_validate(settings),
    )
