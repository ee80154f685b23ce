"""Which files a tokenizer may lie in, and which of them count when there are several.

The order: tokenizer.json is what a Hugging Face checkpoint says about its text, so it wins, together with its
tokenizer_config.json and chat_template.jinja. Without it Mistral's own files count: tekken.json first (mistral-common
prefers it too), then the SentencePiece models. A Jinja template beside these is not read: mistral-common defines the
chats of its own files, and a template says nothing about the control tokens of a file that it was not written for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import TokenizerError
from runtime.json_files import open_regular_file

JSON_FILE = "tokenizer.json"
JSON_COMPANIONS = ("tokenizer_config.json", "chat_template.jinja")
TEKKEN_FILE = "tekken.json"
SENTENCEPIECE_FILE = "tokenizer.model"
SENTENCEPIECE_VERSIONS = ("v1", "v2", "v3", "v7", "v7m1")
"""What may follow "tokenizer.model."; m1 adds images to v7, and its text is that of v7."""

TOKENIZER_FILES = (
    JSON_FILE,
    *JSON_COMPANIONS,
    TEKKEN_FILE,
    SENTENCEPIECE_FILE,
    *(f"{SENTENCEPIECE_FILE}.{version}" for version in SENTENCEPIECE_VERSIONS),
)
"""Every file name that a tokenizer is read from."""

MAX_BYTES = 1 << 28
"""A larger tokenizer file is damaged or something else: the largest published one has 19 MB."""


def needed_files(files: Iterable[Path]) -> tuple[Path, ...]:
    """Those of `files` that `open_tokenizer` reads, the tokenizer itself first; the others may be left behind.

    Raises TokenizerError when there is no tokenizer among them, and when two SentencePiece models disagree.
    """
    named = {file.name: file for file in files}
    if JSON_FILE in named:
        return tuple(named[name] for name in (JSON_FILE, *JSON_COMPANIONS) if name in named)
    if TEKKEN_FILE in named:
        return (named[TEKKEN_FILE],)
    models = [named[name] for name in TOKENIZER_FILES if name.startswith(SENTENCEPIECE_FILE) and name in named]
    if not models:
        raise TokenizerError(
            f"There is no {JSON_FILE}, {TEKKEN_FILE} or {SENTENCEPIECE_FILE} among the tokenizer files, so text cannot "
            "be encoded. Put the checkpoint's tokenizer file beside its weights and export again."
        )
    return (_only_model(models),)


def has_tokenizer(files: Iterable[Path]) -> bool:
    """Whether there is a tokenizer among `files`; companions alone, such as a chat template, are none."""
    return any(file.name in TOKENIZER_FILES and file.name not in JSON_COMPANIONS for file in files)


def sentencepiece_version(file: Path) -> str | None:
    """The version that the name of a SentencePiece model states ("v3" of tokenizer.model.v3), or None."""
    suffix = file.name.removeprefix(SENTENCEPIECE_FILE).removeprefix(".")
    return suffix.removesuffix("m1") or None


def read_bounded(file: Path) -> bytes:
    """The content of a tokenizer file. Raises TokenizerError for one that cannot be read or is far too large."""
    try:
        with open_regular_file(file) as stream:
            if os.fstat(stream.fileno()).st_size <= MAX_BYTES:
                return stream.read(MAX_BYTES)
    except OSError as error:
        raise TokenizerError(f"The tokenizer file {file.name} cannot be read: {error}.") from error
    raise TokenizerError(
        f"The file {file.name} has more than {MAX_BYTES >> 20} MiB, so it is not a tokenizer. Fetch it again."
    )


def _only_model(models: list[Path]) -> Path:
    """The model that counts: checkpoints ship the same bytes as tokenizer.model and as tokenizer.model.v3, and then
    the name that states a version says more."""
    contents = {read_bounded(file) for file in models}
    stated = [file for file in models if sentencepiece_version(file) is not None] or models
    versions = {sentencepiece_version(file) for file in stated}
    if len(contents) > 1 or len(versions) > 1:
        raise TokenizerError(
            f"The tokenizer files {' and '.join(file.name for file in models)} differ in their "
            f"{'content' if len(contents) > 1 else 'version'}, and nothing says which of them the model was trained "
            "with. Remove all but one from the checkpoint and export again."
        )
    return stated[0]
