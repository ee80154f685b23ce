"""The highest logits of each row: found on the device, put in order on the host.

The library promises no order among equal logits, so a few more are fetched than are given out: where those that were
asked for end among equal ones of which some may be missing, or a NaN may be there, all logits of the row are looked at.

Letters: B batch rows, V vocabulary, K highest logits that are fetched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import TopLogits
from runtime.onnxruntime_cuda.interface import IDS, LOGITS, VALUES
from runtime.onnxruntime_cuda.place import Memory, aligned
from runtime.onnxruntime_cuda.sessions import Binding, StepSession
from runtime.step_engine_info import TOP_LOGITS

_INT64, _FLOAT32 = 8, 4
Rows = Callable[[], NDArray[np.float32]]


def most_given(vocab_size: int) -> int:
    """How many can be asked for: one fewer than are fetched, or all there are."""
    return min(TOP_LOGITS - 1, vocab_size)


class Highest:
    """Finds the highest of logits [B, V] at this address of the device. Raises BackendError where memory is lacking.

    number: of the captured graph, given once only.
    """

    def __init__(
        self, session: StepSession, memory: Memory, address: int, batch: int, vocab_size: int, number: int
    ) -> None:
        self._memory = memory
        self._shape = (batch, min(TOP_LOGITS, vocab_size))
        self._is_all = self._shape[1] == vocab_size
        count = batch * self._shape[1]
        self._ids_at = aligned(count * _FLOAT32)
        nbytes = self._ids_at + count * _INT64
        self._block = memory.allocate(nbytes, f"the highest logits of {batch} rows")
        try:
            self._staging = memory.staging(nbytes)
            self._binding = Binding(session)
            self._binding.input(LOGITS, "F32", (batch, vocab_size), address)
            self._binding.output(VALUES, "F32", self._shape, self._block.address)
            self._binding.output(IDS, "I64", self._shape, self._block.address + self._ids_at)
            self._binding.capture_as(number)
        except BaseException:
            self._block.free()
            raise

    def find(self, count: int, all_logits: Rows) -> TopLogits:
        """The `count` highest of each row, as base.TopLogits has them: [B, 1, count], count <= `most_given`.

        all_logits: fetches logits [B, 1, V]; called where some row cannot be told without.
        """
        self._binding.run()
        self._memory.read(self._staging, self._block.address)
        values_BK = self._staging[: self._ids_at].view(np.float32)[: np.prod(self._shape)].reshape(self._shape)
        ids_BK = self._staging[self._ids_at :].view(np.int64).reshape(self._shape)
        values_BN, ids_BN = in_order(values_BK, ids_BK, count)
        unsure_B = values_BN[:, 0] == np.inf  # or a NaN
        if not self._is_all:
            unsure_B |= values_BN[:, -1] == values_BK.min(axis=1)
        if unsure_B.any():
            logits_BV = all_logits()[:, 0]
            for row in np.flatnonzero(unsure_B):
                values_BN[row], ids_BN[row] = of_all(logits_BV[row], count)
        return TopLogits(values_BN[:, None], ids_BN[:, None])

    def free(self) -> None:
        """Give the device's memory back, and let go of the session."""
        self._binding.close()
        self._block.free()


def in_order(
    values_BK: NDArray[np.float32], ids_BK: NDArray[np.int64], count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The first `count` of each row, best first; of equal ones the lower id first."""
    order_BN = np.lexsort((ids_BK, -values_BK), axis=-1)[:, :count]
    return np.take_along_axis(values_BK, order_BN, axis=1), np.take_along_axis(ids_BK, order_BN, axis=1)


def of_all(logits_V: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `count` highest of all logits of a row; the first of them is NaN where there is one anywhere."""
    ids_N = np.argsort(-logits_V, kind="stable")[:count]
    values_N = logits_V[ids_N]
    if np.isnan(logits_V).any():
        values_N[0] = np.nan
    return values_N, ids_N.astype(np.int64)
