"""Where a parameter comes from: runs of elements of checkpoint tensors, one after the other.

Every layout that is read can be said this way, so that one description serves the reference model, which loads values,
and the exporter, which may leave the bytes where they are and only point at them.

    a whole tensor                  one piece
    an expert each, stacked         E pieces, each a matrix
    half of a fused tensor          one piece for [2I, C]; E pieces for [E, 2I, C], since each expert's half is a run
    interleaved RoPE (Mistral's)    one piece, and `pairs_of_head`: rows are put in another order on the way
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reference.checkpoint import Checkpoint
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `begin` to `end` (half-open, row-major) of the checkpoint tensor `tensor` of shape `tensor_shape`."""

    tensor: str
    tensor_shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def whole(self) -> bool:
        """Whether this is all of the tensor."""
        return self.end - self.begin == math.prod(self.tensor_shape)


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The elements of one parameter of shape `shape`: those of its pieces in order.

    All pieces have the same number of elements, a multiple of those of one row (`shape[1:]`).
    pairs_of_head: None, or the head dim D of a projection whose rows come as interleaved pairs: of each head's D rows,
        row 2i becomes row i and row 2i + 1 becomes row i + D/2 (Mistral's own layout to Hugging Face's).
    """

    parameter: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    pairs_of_head: int | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all that it is made of."""
        return tuple(dict.fromkeys(piece.tensor for piece in self.pieces))

    @property
    def is_one_tensor(self) -> bool:
        """Whether the parameter lies in the checkpoint as it is."""
        return len(self.pieces) == 1 and self.pieces[0].whole and self.pairs_of_head is None


def whole(parameter: str, shape: tuple[int, ...], tensor: str) -> WeightSource:
    """The parameter is the tensor."""
    return WeightSource(parameter, shape, (Piece(tensor, shape, 0, math.prod(shape)),))


def stacked(parameter: str, shape: tuple[int, ...], tensors: Sequence[str]) -> WeightSource:
    """The parameter [E, …] is E tensors, stacked along a new leading axis."""
    size = math.prod(shape[1:])
    return WeightSource(parameter, shape, tuple(Piece(tensor, shape[1:], 0, size) for tensor in tensors))


def rows_of(parameter: str, shape: tuple[int, ...], tensor: str, all_rows: int, first: int) -> WeightSource:
    """The parameter is rows `first` to `first + shape[-2]` of a tensor with `all_rows` rows (of each expert, if any).

    A bias [R] counts as R rows of one element.
    """
    matrix = shape if len(shape) == 1 else shape[-2:]
    experts, row = shape[:-2], math.prod(matrix[1:])
    pieces = tuple(
        Piece(
            tensor,
            (*experts, all_rows, *matrix[1:]),
            (e * all_rows + first) * row,
            (e * all_rows + first + matrix[0]) * row,
        )
        for e in range(math.prod(experts))
    )
    return WeightSource(parameter, shape, pieces)


def half_split_order(rows: int, head_dim: int) -> list[int]:
    """For each row of a projection in Hugging Face's layout the row that it is in Mistral's own.

    Mistral rotates neighbours (2i, 2i + 1) and Hugging Face the halves (i, i + D/2); with D = 4 the order of each head
    is 0, 2, 1, 3. Scores are sums over D, so that only queries and keys must agree.
    """
    within = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return [head + row for head in range(0, rows, head_dim) for row in within]


def load_parameter(checkpoint: Checkpoint, source: WeightSource, dtype: torch.dtype) -> torch.Tensor:
    """One parameter of shape `source.shape` in `dtype`, contiguous, cast piece by piece.

    With one whole piece already in `dtype` this is the memory-mapped tensor itself (see `Checkpoint.read`). Raises
    CheckpointError when a value does not fit into `dtype` (above 65504 for float16) and would become infinite.
    """
    import torch

    if len(source.pieces) == 1:
        parameter = _cast(checkpoint, source.pieces[0], dtype).view(source.shape)
    else:
        parameter = torch.empty(source.shape, dtype=dtype)
        for part, piece in zip(parameter.view(len(source.pieces), -1), source.pieces, strict=True):
            part.copy_(_cast(checkpoint, piece, dtype))
    if source.pairs_of_head is not None:
        parameter = parameter[torch.tensor(half_split_order(source.shape[0], source.pairs_of_head))]
    return parameter


def _cast(checkpoint: Checkpoint, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    """The piece's elements in a row, in `dtype`."""
    import torch

    stored = checkpoint.read(piece.tensor).view(-1)[piece.begin : piece.end]
    cast = stored.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(stored.dtype).max and not bool(cast.isfinite().all()):
        largest = float(stored.abs().max())
        raise CheckpointError(
            f"{checkpoint.path} holds {piece.tensor} with values up to {largest:g}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:g}. Use float32 or bfloat16 for these weights."
        )
    return cast
