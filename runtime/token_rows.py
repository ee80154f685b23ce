"""Turning what a user feeds into rows of int64 token ids, or refusing it by name, row and position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from runtime.chunking import Int64Array
from runtime.errors import InputError

TokenIds: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | np.ndarray[Any, Any] | Sequence[Int64Array]
"""int64 [B, T], [T] (one row), or a list of rows, whose lengths may differ."""


def as_rows(token_ids: TokenIds, vocab_size: int) -> list[Int64Array]:
    """The rows of `token_ids`, each 1-D int64; rows may be empty, but not all of them.

    Raises InputError for floats, booleans, more than two dimensions, ids outside 0 ... vocab_size - 1, and when there
    is no token at all.
    """
    if isinstance(token_ids, (list, tuple)):
        nested = [hasattr(item, "__len__") for item in token_ids]
        if any(nested) and not all(nested):
            raise InputError("Token ids must be one row of integers or a list of rows, not a mixture of both.")
        rows = list(token_ids) if any(nested) else [token_ids]
    else:
        array = _as_array(token_ids, "The token ids cannot be read")
        if array.ndim not in (1, 2):
            raise InputError(
                f"Token ids must have the shape [B, T] or [T], not {list(array.shape)}: {array.ndim} dimensions."
            )
        rows = list(array) if array.ndim == 2 else [array]
    checked = [_as_row(row, index, vocab_size) for index, row in enumerate(rows)]
    if sum(row.size for row in checked) == 0:
        raise InputError("The prompt is empty: feed at least one token id (a text usually begins with the BOS id).")
    return checked


def _as_row(row: Any, index: int, vocab_size: int) -> Int64Array:
    if isinstance(row, (list, tuple)):
        # numpy would quietly read True as 1 when it stands among integers.
        for position, item in enumerate(row):
            if isinstance(item, (bool, np.bool_)):
                raise InputError(f"Row {index}, position {position}: {item!r} is a boolean, not a token id.")
    array = _as_array(row, f"Row {index} of the token ids is not one row of integers")
    if array.ndim != 1:
        raise InputError(f"Row {index} of the token ids has {array.ndim} dimensions; the batch must be [B, T] at most.")
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    # Python integers beyond 64 bits make an object array; they are outside the vocabulary, not of a wrong type.
    if array.dtype.kind not in "iu" and not (array.dtype.kind == "O" and all(type(item) is int for item in array)):
        raise InputError(f"Token ids must be integers, but row {index} is of type {array.dtype}.")
    # Compared before the cast to int64, which could wrap a huge unsigned id into the vocabulary.
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        raise InputError(
            f"Row {index}, position {outside[0]}: the token id {array[outside[0]]} is outside the vocabulary, "
            f"which has the ids 0 to {vocab_size - 1}."
        )
    return array.astype(np.int64)


def _as_array(value: Any, complaint: str) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(value)
    except Exception as error:  # ragged lists, and whatever the tensors of other libraries raise
        raise InputError(f"{complaint}: {error}.") from error
