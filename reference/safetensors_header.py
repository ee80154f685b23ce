"""The header of a safetensors file, read and checked without reading any weights.

A file is `N` (8 bytes, little endian), `N` bytes of JSON, then the tensors' bytes. The JSON maps each name to dtype,
shape and the half-open range of its bytes, counted from the end of the header. The format forbids overlaps and holes,
so the ranges, sorted, must tile the rest of the file exactly (https://github.com/huggingface/safetensors).

Cierzo parses the header itself because it needs the absolute offsets, and because a damaged download should be told
apart from a file of another format, with the number of bytes that are missing.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import CheckpointError
from runtime.json_files import MOST_BYTES, brief, open_regular_file, parse_json_object

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes of one element of each dtype, in the spelling of the format."""

_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8
_MOST_TENSOR_BYTES = (1 << 63) - 1  # torch, ONNX and the file system count in signed 64 bits
_MOST_DIMENSIONS = 64  # numpy's limit and torch's: no weight has more than five


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes of `file` from byte `offset` (absolute), row-major."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Entries of all tensors in `file`, in the order of their bytes.

    Raises CheckpointError when the header is damaged, the ranges overlap or leave holes, a range disagrees with dtype
    and shape, or the file is shorter or longer than its header says.
    """
    try:
        with open_regular_file(file) as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            header, data_start = _read_json(file, stream, file_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror or error}. Check the path and its rights."
        ) from error
    header.pop("__metadata__", None)
    entries = [_entry(file, name, description, data_start) for name, description in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_tiling(file, entries, data_start, file_bytes)
    return {entry.name: entry for entry in entries}


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is not an intact safetensors file: {what}. Download or copy it again.")


def _read_json(file: Path, stream: BinaryIO, file_bytes: int) -> tuple[dict[str, Any], int]:
    """The parsed header and the absolute offset of the first tensor byte."""
    length_field = stream.read(_LENGTH_BYTES)
    if len(length_field) < _LENGTH_BYTES:
        raise _damaged(file, f"it has {file_bytes} bytes, and the length of the header alone takes {_LENGTH_BYTES}")
    (header_bytes,) = struct.unpack("<Q", length_field)
    if header_bytes > _MOST_HEADER_BYTES:
        raise _damaged(
            file,
            f"its header would have {header_bytes} bytes, more than the {_MOST_HEADER_BYTES} that the format allows",
        )
    data_start = _LENGTH_BYTES + header_bytes
    if data_start > file_bytes:
        raise _damaged(file, f"it ends {data_start - file_bytes} bytes before the end of its header")
    header = parse_json_object(
        stream.read(min(header_bytes, MOST_BYTES + 1)),
        lambda cause: _damaged(file, f"its header is not the JSON that the format asks for ({cause})"),
    )
    return header, data_start


def _entry(file: Path, name: str, description: object, data_start: int) -> TensorEntry:
    tensor = f"tensor {brief(name)}"
    if not isinstance(description, dict) or set(description) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"{tensor} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = description["dtype"], description["shape"], description["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{file} holds {tensor} of dtype {brief(dtype)}, and Cierzo reads {', '.join(ITEM_BYTES)} only. "
            "Convert the checkpoint to float32, float16 or bfloat16."
        )
    offsets_fit = _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS or not offsets_fit:
        raise _damaged(file, f"{tensor} has shape {brief(shape)} and data_offsets {brief(offsets)}")
    nbytes = offsets[1] - offsets[0]
    expected = _bytes_of(shape, ITEM_BYTES[dtype])
    if nbytes != expected:
        takes = f"takes {expected}" if expected is not None else f"takes more than {_MOST_TENSOR_BYTES}"
        raise _damaged(file, f"{tensor} has {nbytes} bytes, but {dtype} of shape {brief(shape)} {takes}")
    return TensorEntry(name, file, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _bytes_of(shape: list[int], item_bytes: int) -> int | None:
    """Bytes of a tensor; None when its sizes, zeros aside, multiply to more than any file holds.

    Zeros are left aside because a size that no stride can be computed of is damage in an empty tensor as well.
    """
    total = item_bytes
    for size in shape:
        total *= size or 1
        if total > _MOST_TENSOR_BYTES:  # early: the product of all would take quadratic time
            return None
    return 0 if 0 in shape else total


def _check_tiling(file: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """The ranges must follow each other without overlap or hole, and the last must end where the file ends."""
    end, previous = data_start, "the header"
    for entry in entries:
        if entry.offset < end:
            raise _damaged(file, f"tensor {brief(entry.name)} overlaps {previous} by {end - entry.offset} bytes")
        if entry.offset > end:
            raise _damaged(
                file,
                f"{entry.offset - end} bytes between {previous} and tensor {brief(entry.name)} belong to no tensor",
            )
        end, previous = entry.offset + entry.nbytes, f"tensor {brief(entry.name)}"
    if file_bytes < end:
        raise _damaged(file, f"it is truncated: {end - file_bytes} of {end} bytes are missing")
    if file_bytes > end:
        raise _damaged(file, f"{file_bytes - end} bytes follow its last tensor")
