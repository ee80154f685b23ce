"""What a step is given and what it gives, on the host and on the device.

Letters: B batch rows, T tokens of a step, C most of them, R tokens of a step whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.chunking import Int64Array
from runtime.errors import BackendError
from runtime.onnxruntime_cuda.place import MOST_NUMBERS, Block, Bytes, Memory, aligned

_INT64, _FLOAT32 = 8, 4


class StepInputs:
    """The small inputs of steps of up to C tokens at fixed addresses. Raises BackendError where they do not fit.

    starts_at, counts_at, ids_at, positions_at: where each begins on the device, in this order.
    """

    def __init__(self, memory: Memory, batch: int, chunk: int) -> None:
        self._memory = memory
        row, wide = aligned(batch * _INT64), aligned(batch * chunk * _INT64)
        offsets = (0, row, 2 * row, 2 * row + wide)
        nbytes = 2 * row + 2 * wide
        self._block = memory.allocate(nbytes, f"the inputs of {batch} rows")
        self._staging = memory.staging(nbytes)
        self.starts_at, self.counts_at, self.ids_at, self.positions_at = (self._block.address + o for o in offsets)

    def fill(
        self,
        ids_BT: Int64Array,
        start_B: Int64Array,
        count_B: Int64Array,
        positions_BR: Int64Array | None = None,
        *,
        width: int = 1,
    ) -> None:
        """Bring them to the device, ids padded with zeros to T = width; all but the positions by one copy."""
        self._stage(start_B[:, None], self.starts_at, 1)
        self._stage(count_B[:, None], self.counts_at, 1)
        self._send(0, self._stage(ids_BT, self.ids_at, width))
        if positions_BR is not None:
            end = self._stage(positions_BR, self.positions_at, positions_BR.shape[1])
            self._send(self.positions_at - self._block.address, end)

    def _stage(self, array_BN: Int64Array, address: int, width: int) -> int:
        """Write it down on the host, `width` numbers a row; returns where it ends."""
        batch, count = array_BN.shape
        begin = address - self._block.address
        end = begin + int(batch) * width * _INT64
        rows = self._staging[begin:end].view(np.int64).reshape(batch, width)
        rows[:, :count] = array_BN
        rows[:, count:] = 0
        return end

    def _send(self, begin: int, end: int) -> None:
        self._memory.write(self._block.address + begin, self._staging[begin:end])

    def free(self) -> None:
        """Give the device's memory back."""
        self._block.free()


class Logits:
    """Logits [B, R, V] on the device, and where they come to on the host. Those of R = 1 have a place of their own,
    which never moves. Raises BackendError where they do not fit, or are more than ONNX Runtime's kernels can count."""

    def __init__(self, memory: Memory, batch: int, vocab_size: int) -> None:
        self._memory, self._batch, self._vocab_size = memory, batch, vocab_size
        self._one = self._hold(1)
        self._many: tuple[Block, Bytes] | None = None

    def _hold(self, count: int) -> tuple[Block, Bytes]:
        numbers = self._batch * count * self._vocab_size
        if numbers > MOST_NUMBERS:
            raise BackendError(
                f"The logits of {count} tokens of {self._batch} rows would be {numbers} numbers, and ONNX Runtime's "
                f"kernels count up to {MOST_NUMBERS}. Feed fewer rows or fewer tokens at once where the logits of all "
                "tokens are wanted (`forward`), or ask for those of the last ones only (`forward_last`)."
            )
        nbytes = self._batch * count * self._vocab_size * _FLOAT32
        block = self._memory.allocate(nbytes, f"the logits of {self._batch * count} tokens")
        try:
            return block, self._memory.staging(nbytes)
        except BaseException:
            block.free()
            raise

    def _held(self, count: int) -> tuple[Block, Bytes]:
        if count == 1:
            return self._one
        needed = self._batch * count * self._vocab_size * _FLOAT32
        if self._many is None or self._many[0].nbytes < needed:
            if self._many is not None:
                self._many[0].free()
                self._many = None
            self._many = self._hold(count)
        return self._many

    def address(self, count: int) -> int:
        """Where a step leaves the logits of R = `count` tokens of each row."""
        return self._held(count)[0].address

    def fetch(self, count: int) -> NDArray[np.float32]:
        """float32 [B, R, V] of the last step, valid until the next fetch."""
        block, staging = self._held(count)
        used = staging[: self._batch * count * self._vocab_size * _FLOAT32]
        self._memory.read(used, block.address)
        return used.view(np.float32).reshape(self._batch, count, self._vocab_size)

    def free(self) -> None:
        """Give the device's memory back."""
        for held in (self._one, self._many):
            if held is not None:
                held[0].free()
