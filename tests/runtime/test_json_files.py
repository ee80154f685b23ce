"""The JSON reader: what it takes is plain and small, and everything else is one refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from runtime.errors import BundleError, ConfigError
from runtime.json_files import (
    MOST_BYTES,
    MOST_DEPTH,
    MOST_DIGITS,
    MOST_KEY_CHARACTERS,
    brief,
    open_regular_file,
    parse_json_object,
    read_json_object,
)


def refusal(content: bytes, **options: int) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_json_object(content, lambda cause: ConfigError(f"no JSON ({cause})."), **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300
    return message


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_reads_what_json_reads(tmp_path: Path) -> None:
    document = {
        "a": [1, -2.5, 1e300, True, None, "é 😀 \n"],
        "b": {"": {}},
        "ends": [10**MOST_DIGITS - 1, 1 - 10**MOST_DIGITS],
    }
    for ensure_ascii in (True, False):
        text = json.dumps(document, ensure_ascii=ensure_ascii)
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        assert read_json_object(tmp_path / "x.json", ConfigError) == document
    minus_zero = parse_json_object(b'{"a": -0, "b": -0.0}', ConfigError)
    assert minus_zero == {"a": 0, "b": 0}
    assert type(minus_zero["a"]) is int


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"{} {}", "Extra data"),
        (b"[]", "it holds a JSON list, not a JSON object"),
        (b"null", "it holds a JSON null"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        ("{}".encode("utf-16"), "can't decode byte 0xff"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        (rb'{"a": "\ud800"}', "half a surrogate pair"),
        (rb'{"\udc00\ud800": 1}', "no printable name"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' is there twice"),
        (b'{"x": {"a": 1, "a": 2}}', "the key 'a' is there twice"),
        (b'{"a\\nb": 1}', "the key 'a\\nb' is no printable name"),
        (b'{"' + b"k" * (MOST_KEY_CHARACTERS + 1) + b'": 1}', "is no printable name of up to 500 characters"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "'1e999' is larger than a double"),
        (b'{"a": -1E400}', "'-1E400' is larger than a double"),
        (b'{"a": 1' + b"0" * MOST_DIGITS + b"}", "has 41 digits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "has 5000 digits"),
        (nested(MOST_DEPTH + 1), "nested deeper than 64 levels"),
        (nested(100_000), "nested deeper than 64 levels"),
        (b'{"a": ' + b"[" * 1_000_000, "nested deeper than 64 levels"),
        (b'{"a": ' * 100_000, "nested deeper than 64 levels"),
    ],
)
def test_refuses(content: bytes, words: str) -> None:
    assert words in refusal(content)


def test_takes_what_just_fits() -> None:
    assert parse_json_object(nested(MOST_DEPTH), ConfigError)
    assert parse_json_object(b'{"' + b"k" * MOST_KEY_CHARACTERS + b'": "\\ud83d\\ude00"}', ConfigError)
    assert parse_json_object(b'{"a": 1}', ConfigError, most_bytes=8) == {"a": 1}
    assert "more than 7 bytes" in refusal(b'{"a": 1}', most_bytes=7)


def test_finding_a_repeated_key_among_many_takes_no_quadratic_time() -> None:
    keys = [f'"{number}": 0' for number in range(200_000)]
    assert "the key '199999' is there twice" in refusal(("{" + ", ".join([*keys, keys[-1]]) + "}").encode())


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.touch()
    os.truncate(file, 1 << 36)
    with pytest.raises(BundleError, match=f"more than {MOST_BYTES} bytes"):
        read_json_object(file, BundleError)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, words in {
        "pipe": "it is a folder, a pipe or a device, not a file",
        "zero": "it is a folder, a pipe or a device, not a file",
        "folder": "it is a folder, a pipe or a device, not a file",
        "loop": "Too many levels of symbolic links",
        "absent": "No such file",
        "nul\0": "null byte",
        "\ud800": "surrogates not allowed",
        "x" * 300: "name too long",
    }.items():
        with pytest.raises(OSError, match=words):
            open_regular_file(tmp_path / name)
    with pytest.raises(ConfigError, match=r"absent is not readable JSON \(No such file or directory\)\. Do this\."):
        read_json_object(tmp_path / "absent", ConfigError, way_out="Do this.")


def test_brief_is_short_and_printable() -> None:
    assert brief([1, "a\n"]) == r"[1, 'a\n']"
    assert len(brief("x" * 1000)) == 120
    assert brief("\u202e\x1b\ud800").isprintable()
