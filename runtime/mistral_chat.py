"""Chats in Mistral's own format, for the tokenizer files that come without a template.

mistral-common writes the control tokens by id around messages that it encodes as text, so no message can write one.
Its request objects, validators and normalizers are used as they are: a chat has the ids that Mistral's own inference
code would feed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.chat import plain_json, plain_messages
from runtime.errors import TokenizerError
from runtime.token_text import checked_text, library_errors

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.base import InstructTokenizer, Tokenizer

NEEDS = "mistral-common[sentencepiece]"
_TEXT_CHUNKS = ("text", "thinking")
_REFUSED = "The messages do not make a chat that this model knows"


class MistralChat:
    """The chat format of one of mistral-common's tokenizers, by its version."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        with library_errors("The chat format of the tokenizer cannot be used", NEEDS):
            self._instruct = _instruct_tokenizer(tokenizer)
        self._version = tokenizer.version
        self._settings = tokenizer.model_settings_builder

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[int]:
        """The ids of a chat, BOS included.

        messages: with the roles system, user, assistant (content or tool_calls; `"prefix": True` on the last one lets
        the model continue it) and tool. add_generation_prompt: the formats write nothing in front of a reply, so this
        only decides what is accepted: with it the model speaks next, so the last message must be a user's, a tool's or
        a prefix, and tool calls must all be answered (`ValidationMode.serving`); without it any last message will do.
        Raises TokenizerError for what mistral-common refuses, for images and audio, and for tools that the format
        would drop.
        """
        plain = plain_messages(messages)
        plain_tools = None if tools is None else [plain_json(tool, "tools") for tool in tools]
        checked_text(json.dumps([plain, plain_tools], ensure_ascii=False))
        for index, message in enumerate(plain):
            _refuse_media(index, message.get("content"))
        with library_errors(_REFUSED, NEEDS):
            from mistral_common.protocol.instruct.validator import ValidationMode

            mode = ValidationMode.serving if add_generation_prompt else ValidationMode.agnostic
            ids = self._encode(plain, plain_tools, mode)
        # Text never holds this id, so it shows whether the format had a place for the tools: v1 leaves them out.
        if plain_tools and getattr(self._instruct, "BEGIN_AVAILABLE_TOOLS", None) not in ids:
            raise TokenizerError(
                f"The chat format {self._version.value} of the tokenizer has no place for tools in this chat. Leave "
                "`tools` out, or let a user's message follow."
            )
        return ids

    def _encode(self, messages: list[Any], tools: list[Any] | None, mode: ValidationMode) -> list[int]:
        from mistral_common.protocol.instruct.normalize import get_normalizer
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.protocol.instruct.validator import get_validator
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        whole: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer(
            self._instruct, get_validator(self._version, mode), get_normalizer(self._version, self._settings)
        )
        # Serving insists on a model's name, and encodes it nowhere.
        request: ChatCompletionRequest[Any] = ChatCompletionRequest(model="cierzo", messages=messages, tools=tools)
        return [int(token_id) for token_id in whole.encode_chat_completion(request).tokens]


def _instruct_tokenizer(tokenizer: Tokenizer) -> InstructTokenizer[Any, Any, Any]:
    from mistral_common.tokens.tokenizers import instruct

    kinds: dict[str, type[InstructTokenizer[Any, Any, Any]]] = {
        "v1": instruct.InstructTokenizerV1,
        "v2": instruct.InstructTokenizerV2,
        "v3": instruct.InstructTokenizerV3,
        "v7": instruct.InstructTokenizerV7,
        "v11": instruct.InstructTokenizerV11,
        "v13": instruct.InstructTokenizerV13,
        "v15": instruct.InstructTokenizerV15,
    }
    version = tokenizer.version.value
    if version not in kinds:
        raise TokenizerError(f"Cierzo does not know the chat format {version}. Update it, or encode plain text.")
    # Without encoders for images and audio: nothing is ever fetched or decoded.
    return kinds[version](tokenizer, None, None)


def _refuse_media(index: int, content: Any) -> None:
    for chunk in content if isinstance(content, list) else ():
        kind = chunk.get("type") if isinstance(chunk, dict) else None
        if kind not in _TEXT_CHUNKS:
            raise TokenizerError(
                f"Message {index} of the chat has content of the type {kind!r:.40}; this model is fed text only. Send "
                "chunks such as {'type': 'text', 'text': 'Hi'}, or a plain text."
            )
