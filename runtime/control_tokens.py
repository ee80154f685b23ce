"""Making sure that text cannot spell a control token.

A tokenizer.json finds "</s>" or "[INST]" anywhere in a text and turns it into the control token, so a user could end
the conversation or speak in the system's name. The `encode_special_tokens` switch of the tokenizers library helps only
for tokens marked special and only for a whole text; a chat needs both kinds in one text. So the tokenizer is loaded
with every control token *renamed*: its text becomes a private spelling with a random part that no user can know, its
id stays. Nothing that a user writes is a control token then, in any kind of model, and where a chat template wants
one, its private spelling is put in. Example, with the private-use characters shown as ⟨ and ⟩:

    vocabulary  {"<s>": 1, "</s>": 2, "▁hi": 3}    →    {"⟨5f0c:1⟩": 1, "⟨5f0c:2⟩": 2, "▁hi": 3}
    "</s> hi"   was [2, 3]                         →    the ids of "<", "/", "s", ">" and 3
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import TokenizerError

_OPEN, _CLOSE = "\ue000", "\ue001"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_MOST_CHARACTERS = 256
_MOST_CHARACTERS_IN_ALL = 1 << 18  # published tokenizers have up to 1,000 control tokens of a dozen characters
_MARKER_SHAPE = re.compile(r"[<\[{(|]\S*[>\]})|]")


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The control tokens of one tokenizer: public text -> private spelling and back, ids, and patterns for both."""

    private: Mapping[str, str]
    public: Mapping[str, str]
    ids: Mapping[str, int]
    public_pattern: re.Pattern[str]
    private_pattern: re.Pattern[str]

    def to_private(self, text: str) -> str:
        """Replace every public spelling; of overlapping ones the leftmost, then the longest, as tokenizers does."""
        return self.public_pattern.sub(lambda match: self.private[match.group()], text)

    def to_public(self, text: str) -> str:
        """Replace every private spelling by the text that people know."""
        if _OPEN not in text:  # nearly always, and this runs for every token of a stream
            return text
        return self.private_pattern.sub(lambda match: self.public[match.group()], text)


def find_control_tokens(tokenizer_json: Mapping[str, Any], named: Collection[str], templates: str) -> ControlTokens:
    """The control tokens of a parsed tokenizer.json.

    They are the added tokens that are marked special, those that tokenizer_config.json calls special (`named`), and the
    added tokens that a chat template mentions (`templates`, all joined) and that look like a marker: "<think>",
    but not a run of spaces that also indents the template. Other added tokens are ordinary vocabulary.
    Raises TokenizerError for control tokens that are longer, or many more, than those of any tokenizer.
    """
    vocabulary = tokenizer_json["model"].get("vocab")
    ids = {name: vocabulary[name] for name in named if isinstance(vocabulary, dict) and name in vocabulary}
    for token in tokenizer_json.get("added_tokens") or ():
        content = token["content"]
        marker = content in templates and _MARKER_SHAPE.fullmatch(content)
        if token.get("special") or content in named or marker:
            ids[content] = token["id"]
    # Byte tokens are how sentencepiece-like models write any byte; renaming them would break byte fallback.
    ids = {text: token_id for text, token_id in ids.items() if text and not _BYTE_TOKEN.fullmatch(text)}
    sizes = [len(text) for text in ids]
    if max(sizes, default=0) > _MOST_CHARACTERS or sum(sizes) > _MOST_CHARACTERS_IN_ALL:
        raise TokenizerError(
            f"The checkpoint's tokenizer.json has control tokens of up to {max(sizes):,} characters and {sum(sizes):,} "
            f"in all; up to {_MOST_CHARACTERS} and {_MOST_CHARACTERS_IN_ALL:,} are plausible. Repair the file or "
            "download it again."
        )
    nonce = secrets.token_hex(8)
    private = {text: f"{_OPEN}{nonce}:{token_id}{_CLOSE}" for text, token_id in ids.items()}
    public = {spelling: text for text, spelling in private.items()}
    return ControlTokens(private, public, ids, _any_of(private), _any_of(public))


def rename_control_tokens(tokenizer_json: Mapping[str, Any], control: ControlTokens) -> str:
    """The text of a tokenizer.json in which every control token bears its private spelling.

    Merges that would join ordinary pieces into a control token are dropped: text never becomes one.
    Raises TokenizerError for a kind of vocabulary that this function does not know.
    """
    private = control.private
    renamed = dict(tokenizer_json)
    added = list(tokenizer_json.get("added_tokens") or ())
    # A token with a role that is only in the vocabulary: as transformers does, make it findable in a text.
    listed = {token["content"] for token in added}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added += [
        {"id": i, "content": text, "special": True} | flags for text, i in control.ids.items() if text not in listed
    ]
    renamed["added_tokens"] = [
        {**token, "content": private.get(token["content"], token["content"])}
        for token in sorted(added, key=lambda token: int(token["id"]))
    ]
    model = dict(tokenizer_json["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {private.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[private.get(piece, piece), score] for piece, score in vocabulary]
    else:
        raise TokenizerError("The model of tokenizer.json has no vocabulary that Cierzo can read.")
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = private.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if not _makes_control(merge, prefix, private)]
    renamed["model"] = model
    return json.dumps(renamed, ensure_ascii=False)


def _makes_control(merge: str | list[str], prefix: str, private: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in private or right in private or left + right.removeprefix(prefix) in private


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in ordered) if ordered else r"(?!)")
