"""All that depends on the number of rows: rings, inputs, logits, and the graphs that hold their addresses.

Letters: B batch rows, R tokens of a step whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

from runtime.engine_info import DECODE, PREFILL, EngineInfo
from runtime.kernels.cuda.compiler import SUPPORTED_ARCHITECTURES
from runtime.manifest import Manifest
from runtime.tensorrt.device import Device
from runtime.tensorrt.graphs import StepGraphs
from runtime.tensorrt.rings import Rings
from runtime.tensorrt.staging import Logits, StepInputs, Top


class Rows:
    """Memory for `batch` rows. Raises BackendError where the GPU's does not suffice."""

    def __init__(self, manifest: Manifest, info: EngineInfo, device: Device, batch: int) -> None:
        vocab_size = manifest.model.vocab_size
        self._device, self._batch, self._vocab_size = device, batch, vocab_size
        self.rings = Rings(manifest, info, device, batch)
        try:
            self._hold(manifest, device)
        except BaseException:  # who keeps the error keeps this object as well, and would keep the memory with it
            self.rings.free()
            raise

    def _hold(self, manifest: Manifest, device: Device) -> None:
        batch, vocab_size = self._batch, self._vocab_size
        self.inputs = {
            kind: StepInputs(manifest.graph, device, batch, tokens)
            for kind, tokens in ((PREFILL, manifest.kv.chunk), (DECODE, 1))
        }
        self._last = Logits(device, batch, vocab_size)
        self._every: Logits | None = None
        # On a GPU that our own kernels are not made for, all logits come to the host.
        major, minor = map(int, device.compute_capability.split("."))
        runs_kernels = (major, minor) in SUPPORTED_ARCHITECTURES
        self.top = Top(device, self._last, vocab_size) if runs_kernels else None
        self.graphs = StepGraphs(device)

    def logits(self, count: int) -> Logits:
        """Where a step leaves logits of R = `count` tokens of each row.

        Those of a single one have a place of their own, which never moves: graphs hold its address.
        """
        if count == 1:
            return self._last
        if self._every is None or self._every.rows < self._batch * count:
            if self._every is not None:
                self._every.free()
                self._every = None
            self._every = Logits(self._device, self._batch * count, self._vocab_size)
        return self._every

    def free(self) -> None:
        """Give the GPU's memory back, of which the rings and logits are nearly all."""
        self.rings.free()
        self._last.free()
        if self._every is not None:
            self._every.free()
