"""Streams a checkpoint's parameters into the bundle's one safetensors file, and points the graph at it.

At most one slice of a few megabytes is in memory at any time, whatever the checkpoint's size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from graph_passes.unbound import UnboundWeight
from reference.checkpoint import Checkpoint
from reference.weight_source import WeightSource, half_split_order
from runtime.errors import CheckpointError, TraceError

WEIGHTS_FILE = "weights.safetensors"
_SLICE = 1 << 22
"""Elements that are converted at once: 16 MB of float32."""

_ALIGNMENT = 4096
"""The data begin on a page, so that a mapping of the file needs no copy."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """Where each parameter lies in the weights file: absolute offset and length in bytes."""

    offsets: Mapping[str, tuple[int, int]]
    nbytes: int
    sha256: str


def weight_bytes(sources: Mapping[str, WeightSource]) -> int:
    """Bytes of all parameters in float32."""
    return sum(4 * math.prod(source.shape) for source in sources.values())


def write_weights(
    checkpoint: Checkpoint, sources: Mapping[str, WeightSource], path: Path, progress: Progress | None = None
) -> WrittenWeights:
    """Write every parameter as float32 into a safetensors file at `path`, in the order of `sources`.

    Raises CheckpointError for a value that is not finite, or not in float32, and OSError as the disk does.
    """
    header, relative = _header(sources)
    digest = hashlib.sha256(header)
    total, done = weight_bytes(sources), 0
    with path.open("wb") as file:
        file.write(header)
        for source in sources.values():
            for block in _blocks(checkpoint, source):
                data = block.numpy().tobytes()
                digest.update(data)
                file.write(data)
                done += len(data)
                if progress is not None:
                    progress("writing weights", done, total)
        nbytes = file.tell()
    offsets = {name: (len(header) + begin, end - begin) for name, (begin, end) in relative.items()}
    return WrittenWeights(offsets, nbytes, digest.hexdigest())


def _header(sources: Mapping[str, WeightSource]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The safetensors header, padded with spaces, and each parameter's range behind it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ranges: dict[str, tuple[int, int]] = {}
    begin = 0
    for name, source in sources.items():
        end = begin + 4 * math.prod(source.shape)
        entries[name] = {"dtype": "F32", "shape": list(source.shape), "data_offsets": [begin, end]}
        ranges[name] = (begin, end)
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, ranges


def _blocks(checkpoint: Checkpoint, source: WeightSource) -> Iterator[torch.Tensor]:
    """The parameter's elements in order, float32, a slice at a time."""
    if source.pairs_of_head is not None:
        yield from _reordered(checkpoint, source, source.pairs_of_head)
        return
    for piece in source.pieces:
        flat = checkpoint.read(piece.tensor).view(-1)[piece.begin : piece.end]
        for start in range(0, flat.numel(), _SLICE):
            yield _finite(checkpoint, piece.tensor, flat[start : start + _SLICE].to(torch.float32))


def _reordered(checkpoint: Checkpoint, source: WeightSource, head_dim: int) -> Iterator[torch.Tensor]:
    """As `_blocks`, some heads at a time, each with its rows in Hugging Face's order."""
    (piece,) = source.pieces
    rows = checkpoint.read(piece.tensor).view(source.shape)
    at_once = max(1, _SLICE // (head_dim * source.shape[1])) * head_dim
    for start in range(0, source.shape[0], at_once):
        block = rows[start : start + at_once]
        order = torch.tensor(half_split_order(block.shape[0], head_dim))
        yield _finite(checkpoint, piece.tensor, block[order].to(torch.float32).view(-1))


def _finite(checkpoint: Checkpoint, tensor: str, block: torch.Tensor) -> torch.Tensor:
    if not bool(block.isfinite().all()):
        raise CheckpointError(_not_finite(checkpoint, tensor))
    return block


def _not_finite(checkpoint: Checkpoint, piece: str) -> str:
    if bool(checkpoint.read(piece).isfinite().all()):
        return (
            f"{checkpoint.path} holds {piece} with values that float32 cannot hold. There is no engine in float64; "
            "check that the checkpoint is not damaged."
        )
    return (
        f"{checkpoint.path} holds {piece} with values that are infinite or not a number, which every logit behind them "
        "would be too. The training run or a conversion damaged the checkpoint; use an intact one."
    )


def bind_weights(model: ir.Model, written: WrittenWeights, folder: Path) -> None:
    """Point every unbound weight of `model` at its place in the weights file.

    Raises TraceError when the graph and the file do not name exactly the same parameters.
    """
    unbound = {name: v for name, v in model.graph.initializers.items() if isinstance(v.const_value, UnboundWeight)}
    if unbound.keys() != written.offsets.keys():
        odd = sorted(unbound.keys() ^ written.offsets.keys())
        raise TraceError(f"The graph and the checkpoint do not have the same parameters; {len(odd)} differ: {odd[:5]}.")
    for name, value in unbound.items():
        weight = value.const_value
        assert isinstance(weight, UnboundWeight)
        offset, length = written.offsets[name]
        if length != weight.nbytes:
            raise TraceError(f"{name} has {int(weight.nbytes)} bytes in the graph and {length} in the weights file.")
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, weight.dtype, shape=weight.shape, name=name, base_dir=folder
        )
