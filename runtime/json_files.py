"""The one reader of JSON that somebody else wrote: configs, indices, headers, manifests.

Python's parser accepts more than JSON is and more than Cierzo can use, and it fails in a dozen ways. Here every text
ends as a plain object or as one refusal, in time and memory proportional to its size:

    longer than MOST_BYTES             it would be no description of a model, but its objects could fill the memory
    not UTF-8, or with a byte-order mark, or half a surrogate pair in a string (it could not even be printed)
    a key twice                        which one counts differs from reader to reader
    a key that is not printable        keys are names, and names go into messages, tables and other files
    NaN, Infinity, 1e999               no JSON, or no number that a double holds
    integers above MOST_DIGITS digits  no size of anything; arithmetic and messages would take quadratic time
    nested deeper than MOST_DEPTH      whoever walks the result by recursion would overflow the stack

Only the standard library and `runtime.errors` are imported, so that every package may use it.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from runtime.errors import CierzoError

MOST_BYTES = 1 << 24
"""16 MiB hold name and place of 120,000 tensors; the most wasteful text of that length parses into 0.7 GB."""

MOST_DIGITS = 40
"""2^128 has 39; tokenizer_config.json writes 10^30 where it means that there is no limit."""

MOST_DEPTH = 64
"""Published files nest up to 6 deep."""

MOST_KEY_CHARACTERS = 500
"""Names of tensors have up to 150."""

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHOWN = 120


def read_json_object(
    file: Path, error: type[CierzoError], *, way_out: str = "Download it again.", most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """The JSON object that `file` holds.

    error: the class to raise, when the file cannot be read or `parse_json_object` refuses its content; the message is
    one paragraph with the file, the cause and `way_out`.
    """

    def refused(cause: str) -> CierzoError:
        return error(f"{file} is not readable JSON ({cause}). {way_out}")

    try:
        with open_regular_file(file) as stream:
            content = stream.read(most_bytes + 1)
    except OSError as failure:
        raise refused(failure.strerror or str(failure)) from failure
    return parse_json_object(content, refused, most_bytes=most_bytes)


def parse_json_object(
    content: bytes, refused: Callable[[str], CierzoError], *, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """The JSON object that `content` spells: dicts with distinct keys, lists, strings, ints, finite floats, …

    refused: makes the exception out of the cause, a clause such as "the key 'a' is there twice".
    """
    if len(content) > most_bytes:
        raise refused(f"it has more than {most_bytes} bytes, and no file of this kind needs as many")
    if content.startswith(codecs.BOM_UTF8):
        raise refused("it begins with a byte-order mark, which JSON forbids")
    try:
        document = _DECODER.decode(content.decode("utf-8"))
        if _SURROGATE_ESCAPE.search(content):  # a pair of escapes is one character, half a pair none
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as failure:
        raise refused("a string holds half a surrogate pair, which is no Unicode") from failure
    except RecursionError as failure:
        raise refused(f"it is nested deeper than {MOST_DEPTH} levels") from failure
    except ValueError as failure:  # UnicodeDecodeError, JSONDecodeError, and what the hooks below raise
        raise refused(str(failure)) from failure
    if not isinstance(document, dict):
        kind = "null" if document is None else type(document).__name__
        raise refused(f"it holds a JSON {kind}, not a JSON object, but an object belongs there")
    if _is_deeper(document, MOST_DEPTH):
        raise refused(f"it is nested deeper than {MOST_DEPTH} levels")
    return document


def open_regular_file(file: Path) -> BinaryIO:
    """Open `file` for reading; raises OSError also for pipes and devices, whose reading could wait or never end."""
    try:
        # Opening a pipe waits for its writer unless told not to; for a regular file the flag means nothing.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as failure:  # a name with a NUL or half a surrogate pair is none of a file
        raise OSError(str(failure)) from failure
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is a folder, a pipe or a device, not a file")
    return os.fdopen(descriptor, "rb")


def brief(value: object) -> str:
    """`value` as Python spells it, cut to a length that a message can hold."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    for key in mapping:
        if not key.isprintable() or len(key) > MOST_KEY_CHARACTERS:
            raise ValueError(f"the key {brief(key)} is no printable name of up to {MOST_KEY_CHARACTERS} characters")
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {brief(key)} is there twice")
            seen.add(key)
    return mapping


def _integer(literal: str) -> int:
    digits = len(literal.removeprefix("-"))
    if digits > MOST_DIGITS:
        raise ValueError(f"the number {literal[:12]}… has {digits} digits, which nothing in such a file needs")
    return int(literal)


def _float(literal: str) -> float:
    number = float(literal)
    if math.isinf(number):
        raise ValueError(f"the number {brief(literal)} is larger than a double can hold")
    return number


def _constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no number in JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _is_deeper(document: object, most: int) -> bool:
    """Whether objects and lists nest more than `most` levels, found level by level."""
    level = [document]
    for _ in range(most):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [child for children in inner for child in children if isinstance(child, (dict, list))]
    return bool(level)
