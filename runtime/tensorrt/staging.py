"""What a step is given and what it gives, on the host and on the GPU.

Letters: B batch rows, T tokens of a step, R of them whose logits are asked for, V vocabulary, K highest logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import TopLogits
from runtime.chunking import Int64Array
from runtime.kernels.cuda.top_logits import (
    MOST_KEPT,
    TopProblem,
    TopTensors,
    launch_top_logits,
    top_logits_workspace_bytes,
)
from runtime.manifest import GraphInfo
from runtime.tensorrt.device import Device, DeviceMemory, Fence, PinnedMemory, aligned

_INT64, _FLOAT32 = 8, 4


class StepInputs:
    """The four small inputs of a step, one after the other, so that one copy brings them all to the GPU.

    tokens: the largest T.
    """

    def __init__(self, graph: GraphInfo, device: Device, batch: int, tokens: int) -> None:
        self._graph, self._device, self._batch = graph, device, batch
        capacity = 2 * aligned(batch * _INT64) + 2 * aligned(batch * tokens * _INT64)
        self._pinned = device.pinned(capacity)
        self._held = device.allocate(capacity, f"the inputs of {batch} rows")
        self._used = 0
        self._reading: Fence | None = None

    def fill(self, ids_BT: Int64Array, start_B: Int64Array, count_B: Int64Array, positions_BR: Int64Array) -> None:
        """Write them down on the host, as soon as the GPU has read those before."""
        if self._reading is not None:
            self._reading.wait()
            self._reading = None
        self._places: list[tuple[str, int, tuple[int, ...]]] = []
        offset, graph = 0, self._graph
        for name, array in (
            (graph.input_ids, ids_BT),
            (graph.start_positions, start_B),
            (graph.token_counts, count_B),
            (graph.logit_positions, positions_BR),
        ):
            nbytes = array.size * _INT64
            self._pinned.bytes[offset : offset + nbytes].view(np.int64)[:] = array.reshape(-1)
            self._places.append((name, self._held.address + offset, array.shape))
            offset += aligned(nbytes)
        self._used = offset

    def places(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Name, address on the GPU and shape of each."""
        yield from self._places

    def send(self) -> None:
        """Queue the copy to the GPU."""
        self._device.copy_in(self._held.address, self._pinned.bytes[: self._used])

    def sent(self) -> None:
        """Remember that all that has been queued so far may read what is written down."""
        self._reading = self._device.fence()


class Logits:
    """Logits [B, R, V] on the GPU, and where they come to on the host. rows: of one number each, B · R at most."""

    def __init__(self, device: Device, rows: int, vocab_size: int) -> None:
        self.rows = rows
        self._device, self._vocab_size = device, vocab_size
        nbytes = rows * vocab_size * _FLOAT32
        self._held = device.allocate(nbytes, f"the logits of {rows} tokens")
        self._pinned = device.pinned(nbytes)

    @property
    def address(self) -> int:
        """On the GPU."""
        return self._held.address

    def fetch(self, rows: int) -> None:
        """Queue the copy of so many rows to the host."""
        self._device.copy_out(self._pinned.bytes[: rows * self._vocab_size * _FLOAT32], self._held.address)

    def array(self, batch: int, count: int) -> NDArray[np.float32]:
        """What was fetched, [B, R, V]; to be read after `Device.synchronize`."""
        used = self._pinned.bytes[: batch * count * self._vocab_size * _FLOAT32]
        return used.view(np.float32).reshape(batch, count, self._vocab_size)

    def free(self) -> None:
        """Give the GPU's memory back."""
        self._held.free()


class Top:
    """Finds the highest logits of B rows on the GPU. most: how many at most."""

    def __init__(self, device: Device, logits: Logits, vocab_size: int) -> None:
        self._device, self._logits, self._vocab_size = device, logits, vocab_size
        self.most = min(MOST_KEPT, vocab_size)
        workspace = top_logits_workspace_bytes(self._problem(self.most), device.launcher.limits)
        self._workspace: DeviceMemory = device.allocate(workspace, "choosing among logits")
        self._found: DeviceMemory = device.allocate(sum(self._sizes(self.most)), "the highest logits")
        self._pinned: PinnedMemory = device.pinned(sum(self._sizes(self.most)))

    def find(self, count: int) -> None:
        """Queue the search for the `count` highest, and the one copy that brings them to the host."""
        ids_at, nbytes = self._sizes(count)
        values = self._found.address
        tensors = TopTensors(self._logits.address, values, values + ids_at, self._workspace.address)
        launch_top_logits(self._device.launcher, self._problem(count), tensors)
        self._device.copy_out(self._pinned.bytes[: ids_at + nbytes], values)

    def _problem(self, count: int) -> TopProblem:
        return TopProblem(self._logits.rows, self._vocab_size, count)

    def _sizes(self, count: int) -> tuple[int, int]:
        """Where ids begin behind the values, and how many bytes they take."""
        nbytes = self._logits.rows * count * _FLOAT32
        return aligned(nbytes), nbytes

    def array(self, count: int) -> TopLogits:
        """What was found for each row; to be read after `Device.synchronize`."""
        ids_at, nbytes = self._sizes(count)
        shape = (self._logits.rows, 1, count)
        values = self._pinned.bytes[:nbytes].view(np.float32).reshape(shape).copy()
        ids = self._pinned.bytes[ids_at : ids_at + nbytes].view(np.int32).reshape(shape).astype(np.int64)
        return TopLogits(values, ids)
