"""The rolling KV buffer: a ring of S slots per layer, constant in memory for the life of a session.

The token at absolute position p is written to slot `p mod S`. Worked example with S = 5 slots and 7 tokens written
(positions 0 to 6, so `last` = 6):

    slot      0   1   2   3   4
    position  5   6   2   3   4      positions 0 and 1 were overwritten by 5 and 6

Read backwards: slot j holds position `last - ((last - j) mod S)`, e.g. slot 3: 6 - ((6 - 3) mod 5) = 3, and slot 0:
6 - (6 mod 5) = 5. With only 3 tokens written (`last` = 2) slot 4 gives 2 - ((2 - 4) mod 5) = 2 - 3 = -1: a negative
position is a slot that was never written.

How many slots: a step first writes its T <= C new tokens and then attends. Its first query, at position i, still needs
the positions i - W + 1 ... i, while its last token i + C - 1 is already in the ring. These are W + C - 1 consecutive
positions, so S >= W + C - 1. Example with W = 3, C = 2: the queries at 5 and 6 need the positions 3 to 6, four slots.

Letters: B batch rows, L layers, G KV heads, S slots, D head dim, W window, C chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

KV_DTYPES: dict[str, DTypeLike] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
INT8 = "int8"
"""Whole numbers, with a float32 scale for each head of each token in a ring beside: value = number · scale."""

_SCALE_SUFFIX = ".scale"
_NUMBER_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in KV_DTYPES.items()} | {"bfloat16": 2, "float8": 1}
"""Built engines keep keys and values in more types than bundles do."""


def scale_ring(ring: str) -> str:
    """The name of the ring of scales beside the int8 ring of that name, such as `past.0.key.scale`."""
    return ring + _SCALE_SUFFIX


def required_capacity(window: int, chunk: int) -> int:
    """Fewest slots S of a ring for windows of `window` tokens fed in steps of at most `chunk`: W + C - 1."""
    return window + chunk - 1


def slot_of_position(position: int, capacity: int) -> int:
    """The slot that holds the token at absolute position `position` >= 0."""
    return position % capacity


def position_of_slot(slot: int, last: int, capacity: int) -> int:
    """The absolute position that `slot` holds when `last` is the newest position written; negative = never written."""
    return last - (last - slot) % capacity


def kv_bytes(capacities: Iterable[int], *, batch: int, num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of all keys and values: 2 · B · G · (D · bytes-per-number, and 4 for int8's scale) · (sum of S)."""
    vector = head_dim * _NUMBER_BYTES[dtype] + (4 if dtype == INT8 else 0)
    return 2 * batch * num_kv_heads * vector * sum(capacities)


@dataclass(frozen=True, slots=True)
class LayerBuffers:
    """One layer's ring: keys and values, each [B, G, S, D], and for int8 their scales, each float32 [B, G, S]."""

    key_BGSD: NDArray[np.generic]
    value_BGSD: NDArray[np.generic]
    key_scale_BGS: NDArray[np.float32] | None = None
    value_scale_BGS: NDArray[np.float32] | None = None

    @property
    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """All that there is."""
        every = (self.key_BGSD, self.value_BGSD, self.key_scale_BGS, self.value_scale_BGS)
        return tuple(array for array in every if array is not None)


class RollingKV:
    """The KV buffers of one session in host memory; the graph writes into them in place.

    capacities: S of each layer. Every buffer starts as zeros and `clear` makes it zeros again: a slot that was never
    written has attention weight 0, but 0 times a stale NaN or infinity would still be NaN.
    """

    def __init__(self, capacities: Sequence[int], *, batch: int, num_kv_heads: int, head_dim: int, dtype: str) -> None:
        def buffers(capacity: int) -> LayerBuffers:
            shape = (batch, num_kv_heads, capacity, head_dim)
            numbers = [np.zeros(shape, dtype=KV_DTYPES[dtype]) for _ in range(2)]
            scales = [np.zeros(shape[:3], dtype=np.float32) for _ in range(2 if dtype == INT8 else 0)]
            return LayerBuffers(*numbers, *scales)

        self.layers = tuple(buffers(capacity) for capacity in capacities)

    @property
    def nbytes(self) -> int:
        """Bytes held, equal to `kv_bytes` of the same sizes."""
        return sum(array.nbytes for layer in self.layers for array in layer.arrays)

    def clear(self) -> None:
        """Zero every slot."""
        for layer in self.layers:
            for array in layer.arrays:
                array.fill(0)
