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

import torch

from exporter.defaults import WRITING
from exporter.recipes import Recipe, StoredPiece
from reference.checkpoint import Checkpoint
from reference.safetensors_header import ITEM_BYTES
from reference.weight_source import WeightSource, half_split_order
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

    dtypes, ranges: type, and first and last byte (half-open, absolute) of each parameter, in the order of the file.
    """

    header: bytes
    dtypes: Mapping[str, str]
    ranges: Mapping[str, tuple[int, int]]
    nbytes: int

    def recipes(self, sources: Mapping[str, WeightSource]) -> list[Recipe]:
        """How a graph beside the file reads it."""
        return [
            Recipe(name, sources[name].shape, (StoredPiece(WEIGHTS_FILE, begin, end - begin, self.dtypes[name]),))
            for name, (begin, end) in self.ranges.items()
        ]


def plan_file(checkpoint: Checkpoint, sources: Mapping[str, WeightSource], kind: str) -> WeightsFile:
    """The file that holds every parameter in the order of `sources`.

    kind: "fp32", or "stored" for the types that the tensors have; a parameter made of several types is float32.
    """
    dtypes: dict[str, str] = {}
    ranges: dict[str, tuple[int, int]] = {}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, source in sources.items():
        stored = {checkpoint.tensors[piece.tensor].dtype for piece in source.pieces}
        dtypes[name] = stored.pop() if kind != FP32 and len(stored) == 1 else "F32"
        end = begin + ITEM_BYTES[dtypes[name]] * math.prod(source.shape)
        entries[name] = {"dtype": dtypes[name], "shape": list(source.shape), "data_offsets": [begin, end]}
        ranges[name] = (begin, end)
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    absolute = {name: (len(header) + first, len(header) + last) for name, (first, last) in ranges.items()}
    return WeightsFile(header, dtypes, absolute, len(header) + begin)


def write_weights(
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    planned: WeightsFile,
    path: Path,
    progress: Progress | None = None,
) -> str:
    """Write the planned file to `path` and return its SHA-256.

    Raises CheckpointError for a value that is not finite, or not in float32, and OSError as the disk does.
    """
    digest = hashlib.sha256(planned.header)
    done = len(planned.header)
    with path.open("wb") as file:
        file.write(planned.header)
        for name, source in sources.items():
            for block in _blocks(checkpoint, source, _TORCH[planned.dtypes[name]]):
                data = block.view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
                done += len(data)
                if progress is not None:
                    progress(WRITING, done, planned.nbytes)
    return digest.hexdigest()


def _blocks(checkpoint: Checkpoint, source: WeightSource, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The parameter's elements in order, in `dtype`, a slice at a time."""
    if source.pairs_of_head is not None:
        yield from _reordered(checkpoint, source, source.pairs_of_head, dtype)
        return
    for piece in source.pieces:
        flat = checkpoint.read(piece.tensor).view(-1)[piece.begin : piece.end]
        for start in range(0, flat.numel(), _SLICE):
            yield _finite(checkpoint, piece.tensor, flat[start : start + _SLICE].to(dtype))


def _reordered(
    checkpoint: Checkpoint, source: WeightSource, head_dim: int, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """As `_blocks`, some heads at a time, each with its rows in Hugging Face's order."""
    (piece,) = source.pieces
    rows = checkpoint.read(piece.tensor).view(-1)[piece.begin : piece.end].view(source.shape[0], -1)
    at_once = max(1, _SLICE // (head_dim * rows.shape[1])) * head_dim
    for start in range(0, source.shape[0], at_once):
        block = rows[start : start + at_once]
        order = torch.tensor(half_split_order(block.shape[0], head_dim))
        yield _finite(checkpoint, piece.tensor, block[order].to(dtype).view(-1))


def _finite(checkpoint: Checkpoint, tensor: str, block: torch.Tensor) -> torch.Tensor:
    if not bool(block.isfinite().all()):
        raise CheckpointError(_not_finite(checkpoint, tensor))
    return block


def _not_finite(checkpoint: Checkpoint, tensor: str) -> str:
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
