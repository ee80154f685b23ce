"""Tokenizer files of Mistral's own kinds: the real ones that mistral-common carries, and a small tekken.json."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.tokens.tokenizers.base import SpecialTokens

from tests.support.toy_bundle import ToyModel, toy_manifest, write_manifest, write_toy_bundle

DATA = Path(mistral_common.__file__).parent / "data"
PUBLISHED = {
    "tokenizer.model.v1": DATA / "tokenizer.model.v1",
    "tokenizer.model.v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "tokenizer.model.v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "tokenizer.model.v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
    "tokenizer.model.v7m1": DATA / "mistral_instruct_tokenizer_241114.model.v7m1",
    "tekken.json": DATA / "tekken_240718.json",
}
"""Name in a checkpoint -> published file. Mistral Nemo's stands for tekken.json, which exports would meet so."""

TEXTS = [
    "",
    " ",
    "the wind of the valley",
    "café 😀 naïve 👩‍👩‍👧‍👦 🏳️‍🌈",
    "مرحبا بالعالم، كيف الحال؟",
    "日本語の文、漢字。中文測試 한국어",
    "def f(x: int) -> str:\n    return f'{x:>4}'\t# <- [1, 2]\r\n",
    "".join(map(chr, range(32))) + "\x7f",
    "a\u200bb\u200d\ufeffc\u00ad\u2028d",
    "\ufeffbegins with a mark",
    "x" + " " * 300 + "y" + "\n" * 40 + "\t" * 20,
    "  two spaces around  ",
    "\u0301alone, e\u0301 and \u0e33\u0302\u0302\u0302",
    "0123456789 3.14159e-10 ½ ٣",
    "\U0010ffff\ue000\ufffd",
]
CONTROL_TEXTS = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[IMG]", "[SYSTEM_PROMPT]", "<pad>"]


def place(folder: Path, name: str, source: str | None = None) -> Path:
    """Puts a published file into `folder` under `name`; source: the published name, if another."""
    return Path(shutil.copy(PUBLISHED[source or name], folder / name))


def tekken_document(version: str = "v3", *, listed: bool = True, num_special: int = 40) -> dict[str, Any]:
    """A tekken.json with the 256 bytes and a few merges. listed: with its own list of control tokens."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" w", b"in", b" win", b"\xf0\x9f", b"  "]
    document: dict[str, Any] = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(pieces),
            "default_vocab_size": len(pieces) + num_special,
            "default_num_special_tokens": num_special,
            "version": version,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
    }
    if listed:
        names = [token.value for token in SpecialTokens]
        document["special_tokens"] = [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ]
    if version == "v15":
        document["model_settings_builder"] = {
            "reasoning_effort": {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
        }
    return document


def write_tekken(folder: Path, document: object) -> Path:
    """Writes a tekken.json into `folder`."""
    file = folder / "tekken.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    return file


def native_bundle(folder: Path, name: str) -> Path:
    """A toy bundle whose only tokenizer file is `name`."""
    model = ToyModel(vocab_size=303 if name == "tekken.json" else 32768)
    write_toy_bundle(folder, model)
    if name == "tekken.json":
        write_tekken(folder, tekken_document())
    else:
        place(folder, name)
    write_manifest(folder, toy_manifest(folder, model, [name]))
    return folder
