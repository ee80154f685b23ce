"""Which nodes a graph has, read from its file without an ONNX library.

An ONNX file is a protocol buffer: fields, each a tag (number · 8 + wire type) and a value. Four fields on two levels
say what the nodes are: ModelProto.graph 7, GraphProto.node 1, NodeProto.op_type 4 and NodeProto.domain 7 (onnx.proto).
All others are stepped over, weights of the file's own among them.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.errors import BundleError

PLUGIN_DOMAIN = "cierzo"
_GRAPH, _NODE, _OP_TYPE, _DOMAIN = 7, 1, 4, 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_VARINT_BYTES = 10

Buffer = bytes | mmap.mmap


def plugin_ops(file: Path) -> Mapping[str, int]:
    """How many nodes of each plugin op the graph in `file` has, in the order in which they first stand there.

    Nodes of function bodies do not count. Raises BundleError for a file that is missing or no protocol buffer.
    """
    return {op: count for (domain, op), count in all_ops(file).items() if domain == PLUGIN_DOMAIN}


def all_ops(file: Path) -> Mapping[tuple[str, str], int]:
    """As `plugin_ops`, of all ops, by domain ("" for ONNX's own) and name."""
    found: Counter[tuple[str, str]] = Counter()
    try:
        with file.open("rb") as stream:
            if not stream.seek(0, 2):
                return found
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for begin, end in _fields(content, 0, len(content), _GRAPH):
                    for node in _fields(content, begin, end, _NODE):
                        found[_text(content, node, _DOMAIN), _text(content, node, _OP_TYPE)] += 1
    except (OSError, ValueError, IndexError) as error:
        raise BundleError(f"{file} is not a readable ONNX graph ({error}). Export the checkpoint again.") from error
    return found


def _text(content: Buffer, message: tuple[int, int], number: int) -> str:
    """A text field of a message, "" where it has none."""
    for begin, end in _fields(content, *message, number):
        return content[begin:end].decode()
    return ""


def _fields(content: Buffer, begin: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    """Where the fields `number` of kind bytes, text or message lie in the message [begin, end)."""
    at = begin
    while at < end:
        tag, at = _varint(content, at)
        kind, last = tag & 7, at
        if kind == _VARINT:
            _, last = _varint(content, at)
        elif kind == _BYTES:
            length, at = _varint(content, at)
            last = at + length
        elif kind in (_FIXED64, _FIXED32):
            last = at + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"a field of unknown kind {kind} at byte {at}")
        if last > end:
            raise ValueError(f"a field that ends behind its message, at byte {at}")
        if kind == _BYTES and tag >> 3 == number:
            yield at, last
        at = last


def _varint(content: Buffer, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    number = 0
    for index in range(_MOST_VARINT_BYTES):
        byte = content[at + index]
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return number, at + index + 1
    raise ValueError(f"a number of more than {_MOST_VARINT_BYTES} bytes at byte {at}")
