"""All that depends on the number of rows: rings, inputs, logits, and the bindings that hold their addresses.

Letters: B batch rows, T tokens of a step, C most of them, R of them whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.chunking import Int64Array
from runtime.engine_info import DECODE, PREFILL, EngineWeight
from runtime.manifest import Manifest
from runtime.onnxruntime_cuda.highest import Highest
from runtime.onnxruntime_cuda.interface import ring_type
from runtime.onnxruntime_cuda.place import Memory
from runtime.onnxruntime_cuda.rings import Rings, ScratchMemory
from runtime.onnxruntime_cuda.sessions import Binding, StepSession
from runtime.onnxruntime_cuda.staging import Logits, StepInputs
from runtime.onnxruntime_cuda.widths import padded_width
from runtime.step_engine_info import BOUNDS, TOP, StepEngineInfo


@dataclass(frozen=True, slots=True)
class Loaded:
    """What does not depend on the number of rows: sessions by PREFILL, DECODE and TOP, and weights.

    weights: INPUT weights and where they lie on the device.
    """

    manifest: Manifest
    info: StepEngineInfo
    memory: Memory
    sessions: Mapping[str, StepSession]
    weights: Mapping[str, tuple[EngineWeight, int]]

    def binding(self, kind: str) -> Binding:
        """A binding of the graph's weights."""
        session = self.sessions[kind]
        binding = Binding(session)
        for name in session.input_names & self.weights.keys():
            weight, address = self.weights[name]
            binding.input(name, weight.dtype, weight.shape, address)
        return binding


class Rows:
    """Memory for `batch` rows, rings zeroed. number: of the graphs that steps of one token are captured as, given once
    only. Raises BackendError where the device's memory does not suffice; then it is as it was before.
    """

    def __init__(self, loaded: Loaded, batch: int, number: int) -> None:
        self._manifest, self._info, self._memory, self._batch = loaded.manifest, loaded.info, loaded.memory, batch
        self._held: list[Callable[[], None]] = []
        try:
            self._hold(loaded, number)
        except BaseException:  # who keeps the error keeps this object as well, and would keep the memory with it
            self.free()
            raise

    def _hold(self, loaded: Loaded, number: int) -> None:
        manifest, info, memory, batch = self._manifest, self._info, self._memory, self._batch
        graph, vocab_size = manifest.graph, manifest.model.vocab_size
        self.rings = Rings(manifest, info, memory, batch)
        self._held.append(self.rings.free)
        self.rings.clear()
        self._inputs = StepInputs(memory, batch, manifest.kv.chunk)
        self._held.append(self._inputs.free)
        self._logits = Logits(memory, batch, vocab_size)
        self._held.append(self._logits.free)
        self._bounds = np.zeros(2, np.int32)
        self._most_past = max((ring.slots - 1 for ring in info.rings if ring.window is not None), default=0)

        self._prefill, self._decode = loaded.binding(PREFILL), loaded.binding(DECODE)
        self._held += [self._prefill.close, self._decode.close]
        for binding in (self._prefill, self._decode):
            self.rings.bind(binding)
            binding.input(graph.start_positions, "I64", (batch,), self._inputs.starts_at)
        if graph.token_counts in loaded.sessions[PREFILL].input_names:
            self._prefill.input(graph.token_counts, "I64", (batch,), self._inputs.counts_at)
        if info.scratch is not None:
            scratch = ScratchMemory(manifest, ring_type(info), info.scratch, memory, batch)
            self._held.append(scratch.free)
            scratch.bind(self._prefill)
            self._prefill.host_input(BOUNDS, "I32", self._bounds)
        self._decode.input(graph.input_ids, "I64", (batch, 1), self._inputs.ids_at)
        self._decode.output(graph.logits, "F32", (batch, 1, vocab_size), self._logits.address(1))
        self._decode.capture_as(number)
        self.highest = Highest(loaded.sessions[TOP], memory, self._logits.address(1), batch, vocab_size, number)
        self._held.append(self.highest.free)

    def run(self, ids_BT: Int64Array, start_B: Int64Array, count_B: Int64Array, positions_BR: Int64Array) -> None:
        """Run a step. R is 1 at least; its logits are where `logits` finds them, until the next step."""
        tokens, count = ids_BT.shape[1], positions_BR.shape[1]
        if tokens == 1:
            self._inputs.fill(ids_BT, start_B, count_B)
            self._decode.run()
            return
        graph, batch = self._manifest.graph, self._batch
        tokens = padded_width(tokens, self._manifest.kv.chunk)
        self._inputs.fill(ids_BT, start_B, count_B, positions_BR, width=tokens)
        self._prefill.input(graph.input_ids, "I64", (batch, tokens), self._inputs.ids_at)
        self._prefill.input(graph.logit_positions, "I64", (batch, count), self._inputs.positions_at)
        shape = (batch, count, self._manifest.model.vocab_size)
        self._prefill.output(graph.logits, "F32", shape, self._logits.address(count))
        self._bounds[:] = tokens, min(int(start_B.max()), self._most_past) + tokens
        self._prefill.run()

    def logits(self, count: int) -> NDArray[np.float32]:
        """Logits [B, R, V] of the last step, R = `count`, on the host; the next call overwrites them."""
        return self._logits.fetch(count)

    def free(self) -> None:
        """Give the device's memory back, and let go of the sessions."""
        while self._held:
            self._held.pop()()
