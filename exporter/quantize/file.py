"""The weights file of a bundle with quantised weights: every parameter is in it, kept or quantised.

A quantised parameter NAME [..., N, K] lies there as NAME.packed, NAME.scale and NAME.zero (see
`reference.quantized_layout`, with the leading axes of NAME). Tensors are ordered so that each begins at a multiple of
its element's size, as kernels read the file in place: float32 first, and zero points of odd sizes last.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.quantize.decide import Decision, Decisions
from exporter.quantize.stream import THREADS, quantized_slices
from exporter.weights import Progress, Sink, WeightsFile, blocks, lay_out
from graph_passes.lower.formats import packed_name, scale_name, zero_name
from reference.checkpoint import Checkpoint
from reference.quantized_layout import QuantizedFormat
from reference.weights import Source

_KEEPS_PLACES = 8
"""A tensor of whole multiples of so many bytes leaves what follows where it may begin."""


@dataclass(frozen=True, slots=True)
class QuantizedFile:
    """The file before it is written.

    decisions: for each parameter. order: of the parameters in the file. last: zero points that stand at its end.
    """

    layout: WeightsFile
    decisions: Decisions
    order: tuple[str, ...]
    last: frozenset[str]


def plan_quantized_file(decisions: Decisions) -> QuantizedFile:
    """Lay out the file."""
    ordered = dict(sorted(decisions.by_parameter.items(), key=lambda item: _rank(item[1])))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    late: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, decision in ordered.items():
        shape = decisions.sources[name].shape
        if isinstance(decision, str):
            tensors[name] = (decision, shape)
            continue
        *matrix, columns = shape
        count = decision.blocks(columns)
        tensors[packed_name(name)] = ("U8", (*matrix, count, decision.block_bytes))
        tensors[scale_name(name)] = (decision.scale, (*matrix, count))
        if decision.zero_points:
            zero = ("U8", (*matrix, decision.zero_bytes(columns)))
            fits = torch.Size(zero[1]).numel() % _KEEPS_PLACES == 0
            (tensors if fits else late)[zero_name(name)] = zero
    return QuantizedFile(lay_out(tensors | late), decisions, tuple(ordered), frozenset(late))


def _rank(decision: Decision) -> int:
    """Tensors of four bytes an element, then of two: sizes are multiples of what those that follow need."""
    if isinstance(decision, str):
        return 0 if decision == "F32" else 3
    return 1 if decision.scale == "F32" else 2


def write_quantized_file(
    checkpoint: Checkpoint, planned: QuantizedFile, path: Path, progress: Progress | None = None
) -> str:
    """Write the planned file to `path` and return its SHA-256.

    Raises CheckpointError for values that are not finite, ExportError for scales that their type cannot hold, and
    OSError as the disk does.
    """
    late: list[torch.Tensor] = []
    with path.open("wb") as file, ThreadPoolExecutor(THREADS, "quantise") as pool:
        sink = Sink(file, planned.layout, progress)
        for name in planned.order:
            source, decision = planned.decisions.sources[name], planned.decisions.by_parameter[name]
            if isinstance(decision, QuantizedFormat):
                for tensor in _parts(checkpoint, source, decision, planned, pool, late):
                    sink.put(tensor)
                continue
            for block in blocks(checkpoint, source, decision):
                sink.put(block)
        for tensor in late:
            sink.put(tensor)
    return sink.sha256


def _parts(
    checkpoint: Checkpoint,
    source: Source,
    quantized: QuantizedFormat,
    planned: QuantizedFile,
    pool: ThreadPoolExecutor,
    late: list[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """The parameter's numbers slice by slice, then all its scales, then its zero points or those into `late`."""
    scales, zeros = [], []
    for rows in quantized_slices(checkpoint, source, quantized, planned.decisions.search, pool):
        yield rows.packed
        scales.append(rows.scale)
        if rows.zero is not None:
            zeros.append(rows.zero)
    yield from scales
    if zero_name(source.parameter) in planned.last:
        late += zeros
    else:
        yield from zeros
