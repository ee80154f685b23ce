"""A parameter's quantised rows, a slice of a few megabytes at a time, whether they have to be made or are there.

Slices are quantised by two threads while the main one writes; a slice's input is let go of when it is done, and at the
end of a parameter nothing of the checkpoint is mapped any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from exporter.quantize.rows import ScaleCheck, quantize_rows
from exporter.weights import not_finite
from reference.checkpoint import Checkpoint
from reference.packed_source import PackedSource, read_packed
from reference.quantized_layout import QuantizedFormat, QuantizedRows
from reference.weight_source import WeightSource, half_split_order
from reference.weights import Source
from runtime.errors import CheckpointError

_SLICE = 1 << 20
"""Elements that are quantised at once."""

_AHEAD = 2
"""Slices that wait for a thread beside those that the threads are at."""

THREADS = 2


def quantized_slices(
    checkpoint: Checkpoint,
    source: Source,
    quantized: QuantizedFormat,
    search: bool,
    pool: ThreadPoolExecutor,
) -> Iterator[QuantizedRows]:
    """All rows of the parameter in their order, those of all experts one after the other.

    Raises CheckpointError for values that are not finite, and ExportError for those that the format cannot hold.
    """
    if isinstance(source, PackedSource):
        yield from _packed_slices(checkpoint, source)
        return
    check = ScaleCheck(source.parameter, quantized)
    waiting: deque[tuple[str, Future[tuple[QuantizedRows | None, bool]]]] = deque()
    for tensor, rows_RK in row_slices(checkpoint, source):
        # In a list that the thread empties: its note of the call outlives the result, and a file whose rows anybody
        # holds stays mapped, all of its pages that were read included.
        waiting.append((tensor, pool.submit(_emptied, [rows_RK], quantized, search)))
        del rows_RK
        if len(waiting) > THREADS + _AHEAD:
            yield _done(checkpoint, *waiting.popleft(), check)
    while waiting:
        yield _done(checkpoint, *waiting.popleft(), check)
    check.finish()


def _emptied(only: list[torch.Tensor], quantized: QuantizedFormat, search: bool) -> tuple[QuantizedRows | None, bool]:
    """The quantised rows, and whether nothing is left of weights that were not all 0."""
    values_RK = only.pop()
    rows = quantize_rows(values_RK, quantized, search=search)
    return rows, rows is not None and not bool(rows.scale.any()) and bool(values_RK.any())


def _done(
    checkpoint: Checkpoint, tensor: str, future: Future[tuple[QuantizedRows | None, bool]], check: ScaleCheck
) -> QuantizedRows:
    rows, vanished = future.result()
    if rows is None:
        raise CheckpointError(not_finite(checkpoint, tensor))
    check.see(rows.scale, vanished=vanished)
    return rows


def _packed_slices(checkpoint: Checkpoint, source: PackedSource) -> Iterator[QuantizedRows]:
    rows, columns = source.shape[-2:]
    at_once = max(1, _SLICE // columns)
    for expert in range(source.shape[0]) if len(source.shape) == 3 else (None,):
        for first in range(0, rows, at_once):
            yield read_packed(checkpoint, source, expert, first, min(first + at_once, rows))


def row_slices(checkpoint: Checkpoint, source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows [R, K] of a matrix, or of a stack of matrices, as they are stored, with the tensor that they come from."""
    columns = source.shape[-1]
    head = source.pairs_of_head or 1
    at_once = max(1, _SLICE // (head * columns)) * head
    for piece in source.pieces:
        rows = checkpoint.read(piece.tensor).view(-1)[piece.begin : piece.end].view(-1, columns)
        for first in range(0, rows.shape[0], at_once):
            block = rows[first : first + at_once]
            if source.pairs_of_head is not None:
                block = block[torch.tensor(half_split_order(block.shape[0], head))]
            yield piece.tensor, block
