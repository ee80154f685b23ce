"""Text to token ids and back, from the checkpoint's tokenizer.json and chat template.

tokenizer.json is the truth about the text: its post-processor decides about BOS and EOS. tokenizer_config.json gives
the special tokens their roles and may hold the chat template; chat_template.jinja overrides it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.chat import ChatTemplate
from runtime.control_tokens import find_control_tokens, rename_control_tokens
from runtime.errors import TokenizerError
from runtime.json_files import brief
from runtime.token_text import checked_ids, checked_text, library_errors
from runtime.tokenizer_files import JSON_FILE, read_bounded


class JsonTokenizer:
    """Encodes and decodes as transformers does, except that text never becomes a control token (control_tokens.py).

    tokenizer_json: the text of tokenizer.json. config: the parsed tokenizer_config.json. templates: chat templates by
    name, "default" being the usual one. Raises TokenizerError when tokenizer.json cannot be read.
    """

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any], templates: Mapping[str, str]) -> None:
        import tokenizers

        self.special_tokens = _special_tokens(config)
        self._templates = dict(templates)
        self._compiled: dict[str, ChatTemplate] = {}
        try:
            document = json.loads(tokenizer_json)
            control = find_control_tokens(document, _named_special(config), "\n".join(templates.values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TokenizerError(
                f"The checkpoint's tokenizer.json cannot be loaded: {brief(f'{type(error).__name__}: {error}')}. "
                "Download it again."
            ) from error
        with library_errors("The checkpoint's tokenizer.json cannot be loaded", "tokenizers"):
            self._tokenizer = tokenizers.Tokenizer.from_str(rename_control_tokens(document, control))
            # A post-processor that names a token which is not there would panic at the first text.
            self._tokenizer.encode("a", add_special_tokens=True)
        self._control = control
        for text, token_id in control.ids.items():
            if self._tokenizer.token_to_id(control.private[text]) != token_id:
                raise TokenizerError(
                    f"The checkpoint's tokenizer.json gives {text!r} the id {token_id}, which its vocabulary "
                    "contradicts. Repair the tokenizer of the checkpoint and export again."
                )
        # Some checkpoints ship with the truncation or padding of their training run; a prompt must stay whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def from_files(cls, files: Sequence[Path]) -> JsonTokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json and chat_template.jinja; no other files."""
        try:
            texts = {file.name: read_bounded(file).decode() for file in files}
            config = json.loads(texts.get("tokenizer_config.json", "{}"))
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"The tokenizer files cannot be read: {error}.") from error
        if not isinstance(config, dict):
            raise TokenizerError("The checkpoint's tokenizer_config.json is not a JSON object.")
        templates = _templates(config.get("chat_template"))
        if "chat_template.jinja" in texts:
            templates = {"default": texts["chat_template.jinja"]}
        return cls(texts[JSON_FILE], config, templates)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return bool(self._templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Control tokens spelled in it ("</s>", "[INST]") are encoded as ordinary characters.

        add_special_tokens: let the post-processor add BOS (and whatever else the checkpoint asks for).
        Raises TokenizerError for what is not Unicode text.
        """
        return self._ids(checked_text(text), add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a chat, rendered with the checkpoint's template.

        messages: such as {"role": "user", "content": "Hi"}. The template writes BOS itself, so none is added.
        Equal to transformers' `apply_chat_template` for messages that spell no control token; where they do, only the
        template's own control tokens become control tokens. `tools` are JSON schemas, given to the template named
        "tool_use" if there is one. Raises TokenizerError without a template and for what `ChatTemplate` refuses.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            known = f" named {name!r} (it has {', '.join(self._templates)})" if self._templates else ""
            raise TokenizerError(
                f"The checkpoint has no chat template{known}, so it was probably not trained on chats. Encode plain "
                "text instead, or add chat_template.jinja to the checkpoint and export again."
            )
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self._templates[name], self._control, self.special_tokens)
        rendered = self._compiled[name].render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self._ids(checked_text(rendered), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary have no text."""
        ids = checked_ids(token_ids)
        with library_errors("The ids cannot be decoded", "tokenizers"):
            return self._control.to_public(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        with library_errors("The text cannot be encoded", "tokenizers"):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece of the vocabulary, or None."""
        token_id: int | None = self._tokenizer.token_to_id(self._control.private.get(token, token))
        return token_id


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The roles that tokenizer_config.json assigns, such as {"bos_token": "<s>"}; templates see them as variables."""
    roles = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and isinstance(text, str):
            roles[key] = text
    return roles


def _named_special(config: Mapping[str, Any]) -> set[str]:
    """Every token that tokenizer_config.json calls special, with a role or without: transformers heeds them all, even
    those that tokenizer.json lists as ordinary."""
    entries: list[Any] = list(_special_tokens(config).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key)
        entries += listed.values() if isinstance(listed, Mapping) else listed if isinstance(listed, list) else ()
    added = config.get("added_tokens_decoder")
    for token in added.values() if isinstance(added, Mapping) else ():
        if isinstance(token, Mapping) and token.get("special"):
            entries.append(token)
    texts = (entry.get("content") if isinstance(entry, Mapping) else entry for entry in entries)
    return {text for text in texts if isinstance(text, str)}


def _templates(value: Any) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json: absent, one template, or a list of {"name", "template"}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as error:
        raise TokenizerError(
            "`chat_template` in tokenizer_config.json is neither a text nor a list of named templates."
        ) from error
