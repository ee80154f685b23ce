"""Streams a checkpoint's parameters into one safetensors file of the bundle's own.

At most one slice of a few megabytes is in memory at any time, whatever the checkpoint's size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from exporter.defaults import WRITING
from exporter.recipe import Recipe, StoredPiece
from reference.checkpoint import Checkpoint
from reference.quantized_layout import dequantize
from reference.safetensors_header import ITEM_BYTES
from reference.weight_source import WeightSource, half_split_order
from reference.weights import PackedSource, Source, read_packed
from runtime.errors import CheckpointError
from runtime.manifest import FP32

WEIGHTS_FILE = "weights.safetensors"
_SLICE = 1 << 20
"""Elements that are converted at once: 4 MB of float32."""

_ALIGNMENT = 4096
"""The data begin on a page, so that a mapping of the file needs no copy."""

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A safetensors file before it is written. `nbytes` counts all of it, `header` too.

    dtypes, shapes, ranges: type, shape, and first and last byte (half-open, absolute) of each tensor, in the order of
    the file. A tensor is a parameter, or a part of a quantised one.
    """

    header: bytes
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    ranges: Mapping[str, tuple[int, int]]
    nbytes: int

    def recipes(self) -> list[Recipe]:
        """How a graph beside the file reads it."""
        return [
            Recipe(name, self.shapes[name], (StoredPiece(WEIGHTS_FILE, begin, end - begin, self.dtypes[name]),))
            for name, (begin, end) in self.ranges.items()
        ]


def plan_file(checkpoint: Checkpoint, sources: Mapping[str, Source], kind: str) -> WeightsFile:
    """The file that holds every parameter in the order of `sources`.

    kind: "fp32", or "stored" for the types that the tensors have; a parameter made of several types is float32.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, source in sources.items():
        tensors[name] = ("F32" if kind == FP32 else stored_type(checkpoint, source), source.shape)
    return lay_out(tensors)


def stored_type(checkpoint: Checkpoint, source: Source) -> str:
    """The type of all of a parameter's tensors; "F32" for a mixture of types, and for a quantised one's values."""
    if isinstance(source, PackedSource):
        return "F32"
    types = {checkpoint.tensors[piece.tensor].dtype for piece in source.pieces}
    return types.pop() if len(types) == 1 else "F32"


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> WeightsFile:
    """The file that holds these tensors, type and shape by name, one after the other."""
    ranges: dict[str, tuple[int, int]] = {}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        ranges[name] = (begin, end)
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    absolute = {name: (len(header) + first, len(header) + last) for name, (first, last) in ranges.items()}
    dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    return WeightsFile(header, dtypes, shapes, absolute, len(header) + begin)


class Sink:
    """A weights file while it is written: its hash so far, and what of it is done."""

    def __init__(self, file: BinaryIO, planned: WeightsFile, progress: Progress | None) -> None:
        self._file, self._total, self._progress = file, planned.nbytes, progress
        self._digest = hashlib.sha256(planned.header)
        self._done = file.write(planned.header)

    def put(self, tensor: torch.Tensor) -> None:
        """Append a contiguous tensor's bytes."""
        data = tensor.view(-1).view(torch.uint8).numpy().data
        self._digest.update(data)
        self._file.write(data)
        self._done += len(data)
        if self._progress is not None:
            self._progress(WRITING, self._done, self._total)

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()


def write_weights(
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    planned: WeightsFile,
    path: Path,
    progress: Progress | None = None,
) -> str:
    """Write the planned file to `path` and return its SHA-256.

    Raises CheckpointError for a value that is not finite, or not in float32, and OSError as the disk does.
    """
    with path.open("wb") as file:
        sink = Sink(file, planned, progress)
        for name, source in sources.items():
            for block in blocks(checkpoint, source, planned.dtypes[name]):
                sink.put(block)
    return sink.sha256


def blocks(checkpoint: Checkpoint, source: Source, stored: str) -> Iterator[torch.Tensor]:
    """The parameter's elements in order, in the type `stored` as safetensors spells it, a slice at a time.

    Raises CheckpointError for a value that is not finite, or not in that type.
    """
    dtype = _TORCH[stored]
    if isinstance(source, PackedSource):
        yield from _dequantized(checkpoint, source, dtype)
        return
    if source.pairs_of_head is not None:
        yield from _reordered(checkpoint, source, source.pairs_of_head, dtype)
        return
    for piece in source.pieces:
        flat = checkpoint.read(piece.tensor).view(-1)[piece.begin : piece.end]
        for start in range(0, flat.numel(), _SLICE):
            yield _finite(checkpoint, piece.tensor, flat[start : start + _SLICE].to(dtype))


def _dequantized(checkpoint: Checkpoint, source: PackedSource, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    rows, columns = source.shape[-2:]
    at_once = max(1, _SLICE // columns)
    for expert in range(source.shape[0]) if len(source.shape) == 3 else (None,):
        for first in range(0, rows, at_once):
            packed = read_packed(checkpoint, source, expert, first, min(first + at_once, rows))
            block = dequantize(packed, source.format, columns, dtype).view(-1)
            yield _finite(checkpoint, source.tensors[0], block)


def _reordered(
    checkpoint: Checkpoint, source: WeightSource, head_dim: int, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """As `blocks`, some heads at a time, each with its rows in Hugging Face's order."""
    (piece,) = source.pieces
    rows = checkpoint.read(piece.tensor).view(-1)[piece.begin : piece.end].view(source.shape[0], -1)
    at_once = max(1, _SLICE // (head_dim * rows.shape[1])) * head_dim
    for start in range(0, source.shape[0], at_once):
        block = rows[start : start + at_once]
        order = torch.tensor(half_split_order(block.shape[0], head_dim))
        yield _finite(checkpoint, piece.tensor, block[order].to(dtype).view(-1))


def _finite(checkpoint: Checkpoint, tensor: str, block: torch.Tensor) -> torch.Tensor:
    if not bool(block.isfinite().all()):
        raise CheckpointError(not_finite(checkpoint, tensor))
    return block


def not_finite(checkpoint: Checkpoint, tensor: str) -> str:
    """What to say of a checkpoint's tensor that did not come out finite."""
    flat = checkpoint.read(tensor).view(-1)
    if all(bool(flat[start : start + _SLICE].isfinite().all()) for start in range(0, flat.numel(), _SLICE)):
        return (
            f"{checkpoint.path} holds {tensor} with values that float32 cannot hold. There is no engine in float64; "
            "check that the checkpoint is not damaged."
        )
    return (
        f"{checkpoint.path} holds {tensor} with values that are infinite or not a number, which every logit behind "
        "them would be too. The training run or a conversion damaged the checkpoint; use an intact one."
    )
