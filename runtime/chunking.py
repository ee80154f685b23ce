"""Cutting rows of tokens into steps of at most C tokens.

Every step feeds all rows at once, right padded to the longest piece of that step. Worked example with C = 4, two rows
of 6 and 3 new tokens that already hold 10 and 20 tokens:

    step 0   row 0: a b c d   start 10  count 4        row 1: x y z 0   start 20  count 3
    step 1   row 0: e f       start 14  count 2        row 1: 0 0       start 23  count 0

The last step is only 2 wide, not 4: what no row needs is not computed. A row that has ended idles with count 0.

A step computes logits only for the tokens that somebody asks for: all of them (`all_positions`), or those that end a
row (`last_positions`), of which most steps of a long feed have none.

Letters: B batch rows, T tokens of a step (T <= C), C chunk, R tokens of each row whose logits are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
PADDING_ID = 0
"""Any id of the vocabulary would do: padding is never written to the ring and nobody asks for its logits."""


@dataclass(frozen=True, slots=True)
class Step:
    """One run of the graph. `offset` is where this step's tokens begin in every row of the feed."""

    input_ids_BT: Int64Array
    start_positions_B: Int64Array
    token_counts_B: Int64Array
    offset: int


def split_into_steps(rows: Sequence[Int64Array], positions_B: Int64Array, chunk: int) -> Iterator[Step]:
    """Yield the steps that feed `rows` (1-D int64 arrays, lengths may differ, may be empty) to B rows.

    positions_B: int64 [B], how many tokens each row already holds. Nothing is yielded when every row is empty.
    """
    lengths_B = np.array([row.size for row in rows], dtype=np.int64)
    for offset in range(0, int(lengths_B.max(initial=0)), chunk):
        counts_B = np.clip(lengths_B - offset, 0, chunk)
        input_ids_BT = np.full((len(rows), int(counts_B.max())), PADDING_ID, dtype=np.int64)
        for index, row in enumerate(rows):
            input_ids_BT[index, : counts_B[index]] = row[offset : offset + counts_B[index]]
        yield Step(input_ids_BT, positions_B + np.minimum(lengths_B, offset), counts_B, offset)


def all_positions(step: Step) -> Int64Array:
    """Every token of the step, padding included: int64 [B, R] with R = T."""
    batch, tokens = step.input_ids_BT.shape
    return np.tile(np.arange(tokens, dtype=np.int64), (batch, 1))


def last_positions(step: Step, lengths_B: Int64Array) -> Int64Array:
    """The token that ends each row's feed, where the step has it: int64 [B, 1], or [B, 0] when it ends no row.

    lengths_B: int64 [B], of the rows that are being fed. A row that does not end in this step is given token 0, whose
    logits nobody reads.
    """
    ends_B = rows_that_end(step, lengths_B)
    if not ends_B.any():
        return np.zeros((len(ends_B), 0), dtype=np.int64)
    return np.where(ends_B, step.token_counts_B - 1, 0)[:, None]


def rows_that_end(step: Step, lengths_B: Int64Array) -> NDArray[np.bool_]:
    """bool [B]: the rows whose last token is in this step; see `last_positions`."""
    ends_B: NDArray[np.bool_] = (step.token_counts_B > 0) & (step.offset + step.token_counts_B == lengths_B)
    return ends_B
