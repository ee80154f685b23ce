"""Headers made to harm: sizes whose product overflows, names that break lines, files that are none."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from reference.safetensors_header import read_header
from runtime.errors import CheckpointError


def write(file: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def tensor(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize(
    "shape", [[2**62, 2], [10**30], [2**40, 2**40, 0], [3**20] * 64, [2**31] * 4], ids=["63", "one", "zero", "64", "4"]
)
def test_sizes_that_multiply_to_more_than_any_file(tmp_path: Path, shape: list[int]) -> None:
    assert "takes more than 9223372036854775807" in refusal(write(tmp_path / "x", {"a": tensor(shape, 0, 0)}))


def test_more_dimensions_than_any_tensor_has(tmp_path: Path) -> None:
    assert "has shape [1, 1, 1" in refusal(write(tmp_path / "x", {"a": tensor([1] * 65, 0, 4)}, b"1234"))
    assert "has shape [2, 2, 2" in refusal(write(tmp_path / "x", {"a": tensor([2] * 100_000, 0, 4)}, b"1234"))
    assert read_header(write(tmp_path / "x", {"a": tensor([1] * 64, 0, 4)}, b"1234"))["a"].shape == (1,) * 64


def test_offsets_far_outside(tmp_path: Path) -> None:
    file = write(tmp_path / "x", {"a": tensor([1], 2**63, 2**63 + 4)}, b"1234")
    assert "9223372036854775808 bytes between the header and tensor 'a' belong to no tensor" in refusal(file)
    file = write(tmp_path / "x", {"a": tensor([2**38], 0, 2**40)}, b"1234")
    assert "it is truncated" in refusal(file)


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    header = {"empty": tensor([0, 3], 0, 0), "scalar": tensor([], 0, 4), "end": tensor([0], 4, 4)}
    entries = read_header(write(tmp_path / "x", header, b"1234"))
    assert {name: (entry.shape, entry.nbytes) for name, entry in entries.items()} == {
        "empty": ((0, 3), 0),
        "scalar": ((), 4),
        "end": ((0,), 0),
    }


@pytest.mark.parametrize("value", [0.5, "1", None, True, -1, [1], {}], ids=str)
def test_values_that_are_no_sizes(tmp_path: Path, value: object) -> None:
    for entry in (tensor([1], 0, 4) | {"shape": [value]}, tensor([1], 0, 4) | {"data_offsets": [0, value]}):
        assert "has shape" in refusal(write(tmp_path / "x", {"a": entry}, b"1234"))


def test_what_is_found_is_shown_briefly(tmp_path: Path) -> None:
    assert "F4F4…" not in refusal(write(tmp_path / "x", {"a": tensor([1], 0, 4) | {"dtype": "F4"}}))
    long = "F4" * 10_000
    assert "F4F4…" in refusal(write(tmp_path / "x", {"a": tensor([1], 0, 4) | {"dtype": long}}))
    assert "no printable name" in refusal(write(tmp_path / "x", {"a\x1b[2J": tensor([1], 0, 4)}, b"1234"))


def test_a_header_longer_than_any_real_one_is_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(struct.pack("<Q", 1 << 26))
    os.truncate(file, 1 << 36)
    assert "more than 16777216 bytes" in refusal(file)
    file.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(file, 1 << 36)
    assert "more than the 100000000 that the format allows" in refusal(file)


def test_brackets_without_end(tmp_path: Path) -> None:
    assert "nested deeper" in refusal(write(tmp_path / "x", b'{"a":' + b"[" * 10_000_000))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for file in (tmp_path / "pipe", tmp_path / "zero", tmp_path):
        assert "it is a folder, a pipe or a device" in refusal(file)
