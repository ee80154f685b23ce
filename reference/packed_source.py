"""Where a parameter comes from that a checkpoint holds quantised: matrices in a published layout, read as our blocks.

Nothing is quantised again. Integers and zero points stay what they are, and a scale that was for more columns than a
block has is repeated for each of its blocks. Scales of float16 stay, those of bfloat16 become float32, which holds
each of them.

Symbols: N rows, K columns, E experts, R some rows, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reference.checkpoint import Checkpoint
from reference.packed_layouts import PackedMatrix
from reference.quantized_layout import (
    BLOCK_SIZES,
    QuantizedFormat,
    QuantizedRows,
    dequantize,
    pack_rows,
    scale_dtype,
)
from reference.safetensors_header import TensorEntry
from reference.weight_source import WeightSource
from reference.weight_source import load_parameter as load_plain
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_SMALLER = (128, 64, 32, 16)
"""Blocks that stand for larger groups, and for whole rows, in the order of preference."""

_AT_ONCE = 1 << 20
"""Elements that are unpacked at once when a parameter is loaded."""


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """Rows `first_row` and following of a packed matrix: all of it, unless projections lie fused in one."""

    matrix: PackedMatrix
    first_row: int


@dataclass(frozen=True, slots=True)
class PackedSource:
    """A quantised parameter [N, K], or [E, N, K] with a matrix for each expert.

    format: of the blocks that `read_packed` gives. pieces: one, or E. tensors: names of all that it is made of.
    """

    parameter: str
    shape: tuple[int, ...]
    format: QuantizedFormat
    pieces: tuple[PackedPiece, ...]
    tensors: tuple[str, ...]


def packed_source(
    plain: WeightSource, matrices: Mapping[str, PackedMatrix], tensors: Mapping[str, TensorEntry]
) -> PackedSource:
    """The source of a parameter whose plain source, `plain`, would be the weights of the layers `matrices`.

    matrices: by the name of the plain tensor of which each stands in the place. Raises CheckpointError when they are
    quantised in different ways, or in groups that no blocks stand for.
    """
    schemes = {matrix.scheme for matrix in matrices.values()}
    if len(schemes) > 1 or len(matrices) < len({piece.tensor for piece in plain.pieces}):
        raise CheckpointError(
            f"The parts of {plain.parameter} ({', '.join(list(matrices)[:2])} …) are quantised in different ways, or "
            "only some of them are, and an engine reads them as one. Use a checkpoint that quantises all in one way."
        )
    (scheme,) = schemes
    columns = plain.shape[-1]
    scales = {tensors[matrix.scale].dtype for matrix in matrices.values() if matrix.scale in tensors}
    found = QuantizedFormat(
        bits=scheme.bits,
        block_size=_block_size(plain.parameter, next(iter(matrices.values()))),
        zero_points=not scheme.symmetric,
        scale="F16" if scales == {"F16"} else "F32",
    )
    pieces = tuple(PackedPiece(matrices[piece.tensor], piece.begin // columns) for piece in plain.pieces)
    names = {name: None for matrix in matrices.values() for name in matrix.expected(tensors)}
    return PackedSource(plain.parameter, plain.shape, found, pieces, tuple(names))


def read_packed(
    checkpoint: Checkpoint, source: PackedSource, expert: int | None, first_row: int, last_row: int
) -> QuantizedRows:
    """Rows `first_row` to `last_row` (half-open) of the parameter, or of one expert's matrix, as our blocks.

    Exact: the integers of the checkpoint. With gptq and awq, whose rows lie across the file, larger slices are faster.
    Raises CheckpointError for scales that are not finite, and for integers that the config's bits do not hold.
    """
    import torch

    piece = source.pieces[expert or 0]
    matrix, columns = piece.matrix, source.shape[-1]
    numbers = matrix.read(checkpoint, piece.first_row + first_row, piece.first_row + last_row)
    if not bool(numbers.scale.isfinite().all()):
        raise CheckpointError(
            f"{checkpoint.path} holds {matrix.scale} with values that are infinite or not a number, which every logit "
            "behind them would be too. A conversion damaged the checkpoint; use an intact one."
        )
    group = torch.arange(source.format.blocks(columns)) * source.format.block_size // matrix.group
    return pack_rows(
        numbers.q.contiguous(),
        numbers.scale[:, group].to(scale_dtype(source.format)),
        None if numbers.zero is None else numbers.zero[:, group],
        source.format,
    )


def load_parameter(checkpoint: Checkpoint, source: WeightSource | PackedSource, dtype: torch.dtype) -> torch.Tensor:
    """One parameter of shape `source.shape` in `dtype`, contiguous; a quantised one as scale * (q - zero).

    See `reference.weight_source.load_parameter` and `reference.quantized_layout.dequantize`. Raises CheckpointError
    when a value does not fit into `dtype`.
    """
    import torch

    if isinstance(source, WeightSource):
        return load_plain(checkpoint, source, dtype)
    rows, columns = source.shape[-2:]
    parameter = torch.empty(source.shape, dtype=dtype)
    at_once = max(1, _AT_ONCE // columns)
    for expert, matrix in enumerate(parameter.view(-1, rows, columns)):
        for first in range(0, rows, at_once):
            last = min(first + at_once, rows)
            packed = read_packed(checkpoint, source, expert, first, last)
            matrix[first:last] = dequantize(packed, source.format, columns, dtype)
    if dtype == torch.float16 and not bool(parameter.isfinite().all()):
        raise CheckpointError(
            f"{checkpoint.path} holds {source.parameter} with values beyond 65504, where {dtype} ends. Use float32 or "
            "bfloat16 for these weights."
        )
    return parameter


def _block_size(parameter: str, matrix: PackedMatrix) -> int:
    """The block that stands for the matrix's groups: as large, or a part of them."""
    if matrix.groups == 1:
        return next((size for size in _SMALLER if matrix.columns % size == 0), _SMALLER[0])
    if matrix.group in BLOCK_SIZES:
        return matrix.group
    for size in _SMALLER:
        if matrix.group % size == 0:
            return size
    raise CheckpointError(
        f"{parameter} is quantised in groups of {matrix.group} columns, and Cierzo's blocks of "
        f"{', '.join(map(str, BLOCK_SIZES))} are no part of that. Use a checkpoint with other groups."
    )
