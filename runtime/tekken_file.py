"""Reading and checking tekken.json, Mistral's byte-level tokenizer file, before any library sees it.

The layout: `config` holds the splitting pattern, the chat version and two sizes; `vocab` lists the ordinary tokens by
rank, the 256 single bytes first; `special_tokens` lists the control tokens (files up to v7 may leave the list out, and
mean a fixed one then). Ids count control tokens first:

    id = rank                                     control tokens; unnamed ones up to default_num_special_tokens
    id = default_num_special_tokens + rank        ordinary tokens, as many as make default_vocab_size ids in all

mistral-common believes the sizes and drops what is not base64, so a damaged file could take all memory or mean other
tokens. Hence every entry is checked here.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import TokenizerError
from runtime.json_files import parse_json_object
from runtime.token_text import library_errors
from runtime.tokenizer_files import read_bounded

NEEDS = "mistral-common"
_MOST_BYTES = 48 << 20  # published files have up to 19 MB
_MOST_SPECIAL = 1 << 16  # published files have 1,000
_LAST_VERSION_WITHOUT_LIST = 7


@dataclass(frozen=True, slots=True)
class TekkenFile:
    """A checked tekken.json. vocab and special_tokens: the file's entries, only those that get an id.

    special_names: the texts of the named control tokens; their places are their ids.
    """

    version: str
    pattern: str
    vocab: list[dict[str, Any]]
    special_tokens: list[dict[str, Any]]
    num_special: int
    model_settings: Any

    @property
    def special_names(self) -> list[str]:
        return [str(token["token_str"]) for token in self.special_tokens]

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return self.num_special + len(self.vocab)


def read_tekken(file: Path) -> TekkenFile:
    """Read and check tekken.json. Raises TokenizerError with the first thing that is wrong."""
    document = parse_json_object(read_bounded(file), _damaged, most_bytes=_MOST_BYTES)
    config = document.get("config")
    if not isinstance(config, dict):
        raise _damaged("it has no `config`")
    version, pattern = config.get("version"), config.get("pattern")
    if not isinstance(version, str) or not (version[:1] == "v" and version[1:].isascii() and version[1:].isdigit()):
        raise _damaged(f"its version is {version!r}, not a name such as 'v3'")
    if not isinstance(pattern, str):
        raise _damaged("`config.pattern` is not a text")
    special = _special_tokens(document.get("special_tokens"), version)
    num_special = _count(config, "default_num_special_tokens", len(special), _MOST_SPECIAL)
    vocab = document.get("vocab")
    if not isinstance(vocab, list):
        raise _damaged("`vocab` is not a list")
    size = _count(config, "default_vocab_size", num_special + 256, num_special + len(vocab))
    vocab = vocab[: size - num_special]
    _check_vocabulary(vocab)
    return TekkenFile(version, pattern, vocab, special, num_special, document.get("model_settings_builder"))


def _damaged(reason: str) -> TokenizerError:
    return TokenizerError(
        f"tekken.json cannot be used: {reason}. The file is damaged or of another kind; fetch it again."
    )


def _count(config: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = config.get(key)
    if type(value) is not int or not least <= value <= most:
        raise _damaged(f"`config.{key}` is {value!r:.40}, not a whole number from {least} to {most}")
    return value


def _special_tokens(listed: Any, version: str) -> list[dict[str, Any]]:
    if listed is None:
        if len(version) > 4 or int(version[1:]) > _LAST_VERSION_WITHOUT_LIST:
            raise _damaged(f"it has no `special_tokens`, which version {version} needs")
        with library_errors("tekken.json cannot be read", NEEDS):
            from mistral_common.tokens.tokenizers.tekken import Tekkenizer

            return [{**token, "token_str": str(token["token_str"])} for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    if not isinstance(listed, list):
        raise _damaged("`special_tokens` is not a list")
    names = set()
    for rank, token in enumerate(listed):
        name = token.get("token_str") if isinstance(token, dict) else None
        if not isinstance(name, str) or not name or name in names:
            raise _damaged(f"special token {rank} has no text of its own")
        if type(token.get("rank")) is not int or token["rank"] != rank:
            raise _damaged(f"special token {rank} has the rank {token.get('rank')!r:.40}")
        names.add(name)
    if not {"<s>", "</s>"} <= names:
        raise _damaged("its `special_tokens` lack <s> or </s>")
    return listed


def _check_vocabulary(vocab: list[Any]) -> None:
    """Each entry has exactly the keys rank, token_bytes and token_str, its own rank, and bytes that no other has."""
    seen: set[bytes] = set()
    keys = {"rank", "token_bytes", "token_str"}
    for rank, token in enumerate(vocab):
        if not isinstance(token, dict) or token.keys() != keys:
            raise _damaged(f"token {rank} is not an object with `rank`, `token_bytes` and `token_str`")
        if type(token["rank"]) is not int or token["rank"] != rank:
            raise _damaged(f"token {rank} has the rank {token['rank']!r:.40}")
        try:
            data = base64.b64decode(token["token_bytes"], validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise _damaged(f"the bytes of token {rank} are not base64 ({error})") from error
        if rank < 256 and data != bytes([rank]):
            raise _damaged(f"token {rank} is not the single byte {rank}")
        if not data or data in seen:
            raise _damaged(f"token {rank} has no bytes of its own")
        seen.add(data)
