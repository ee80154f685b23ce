"""Golden files: what an engine once wrote after a prompt, a key a line, so that differences can be read in a review."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from exporter.whole_file import write_whole
from runtime.errors import ExportError, InputError
from runtime.json_files import read_json_object

GOLDEN_VERSION = 1
"""Of the file; another one is refused."""

_WHAT = "The golden file"


def write_golden(
    file: Path, prompt: object, ids: Sequence[int], new: Sequence[int], text: str | None, max_new_tokens: int
) -> None:
    """Write a golden file, unless it holds the same already.

    prompt: as it was given, for whoever reads the file. ids, new: token ids of the prompt and of its continuation.
    Raises ExportError when the file cannot be written.
    """
    document = {
        "cierzo_golden": GOLDEN_VERSION,
        "prompt": prompt if isinstance(prompt, str | list | tuple) else list(ids),
        "prompt_ids": list(ids),
        "max_new_tokens": max_new_tokens,
        "new_ids": list(new),
        "text": text,
    }
    lines = [
        f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False, default=str)}" for name, value in document.items()
    ]
    content = "{\n" + ",\n".join(lines) + "\n}\n"
    if _content(file) == content.encode("utf-8", errors="replace"):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{_WHAT} {file} cannot be written: {error.strerror or error}.") from error
    write_whole(file, content, _WHAT)


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def stored_golden(file: Path, ids: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
    """The continuation in a golden file. Raises InputError where it has none for these options."""
    way_out = "Run the tests with --cierzo-update-golden, which writes it from this engine if that is found right."
    if not file.exists():
        raise InputError(f"There is no golden file {file} yet. {way_out}")
    document = read_json_object(file, InputError, way_out=way_out)
    new = document.get("new_ids")
    if document.get("cierzo_golden") != GOLDEN_VERSION or not _are_ids(new) or not _are_ids(document.get("prompt_ids")):
        raise InputError(f"{file} is not a golden file of this version. {way_out}")
    if document["prompt_ids"] != list(ids) or document.get("max_new_tokens") != max_new_tokens:
        raise InputError(f"{file} is of another prompt, tokenizer or number of tokens. {way_out}")
    return tuple(document["new_ids"])


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
