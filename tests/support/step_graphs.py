"""Runs an engine's two graphs, one for many tokens and one for a single one, on ONNX Runtime's CPU provider.

Buffers are bound as a GPU runtime binds them: past and present rings are one, and all layers have one scratch memory.
So a graph that relies on the order in which nodes happen to run shows it here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backends.base import Numerics
from runtime.bundle import Bundle
from runtime.chunking import Int64Array
from runtime.engine_info import DECODE, PREFILL
from runtime.profile import StepRun
from runtime.step_engine_info import BOUNDS, PAGE, Scratch, StepRing
from tests.support.lowered import RING_TYPES
from tests.support.paged_attention import with_paged_body

RUBBISH = 1e4
"""What lies in all buffers at first: it would show in every logit if it were seen. (A weight of 0 times NaN is NaN,
which kernels avoid by not reading what is masked, and function bodies do not.)"""


class StepEngine:
    """An Engine (runtime/backends/base.py) around the graphs for many tokens and for one."""

    built = None
    device = "a double"
    kernels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    top = None

    def __init__(
        self,
        bundle: Bundle,
        prefill: onnx.ModelProto,
        decode: onnx.ModelProto,
        rings: tuple[StepRing, ...],
        scratch: Scratch | None,
        arithmetic: str,
    ) -> None:
        self._manifest = bundle.manifest
        self.numerics = Numerics(arithmetic, arithmetic, rounds_activations=False)
        self._type = RING_TYPES[arithmetic]
        self._plan, self._scratch_plan = rings, scratch
        self._prefill, self._decode = _session(prefill), _session(decode)
        self.steps: list[str] = []
        self.allocate(1)

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def kv_bytes(self) -> int:
        return sum(ring.nbytes for ring in self.rings.values())

    def end_profile(self) -> tuple[StepRun, ...]:
        return ()

    def allocate(self, batch: int) -> None:
        self._batch = batch
        model = self._manifest.model
        self.rings = {
            name: np.full((batch, ring.slots, model.num_kv_heads * model.head_dim), RUBBISH, self._type)
            for ring in self._plan
            for name in (ring.past_key, ring.past_value)
        }
        self._held = {name: ort.OrtValue.ortvalue_from_numpy(ring) for name, ring in self.rings.items()}
        self._scratch: dict[str, ort.OrtValue] = {}
        if self._scratch_plan is not None:
            shape = (batch * self._scratch_plan.slots // PAGE, PAGE, model.num_kv_heads, model.head_dim)
            for names in (self._scratch_plan.keys, self._scratch_plan.values):
                memory = ort.OrtValue.ortvalue_from_numpy(np.full(shape, RUBBISH, self._type))
                self._scratch |= dict.fromkeys(names, memory)

    def clear(self) -> None:
        self.allocate(self._batch)

    def step(
        self, input_ids: Int64Array, start_positions: Int64Array, token_counts: Int64Array, logit_positions: Int64Array
    ) -> NDArray[np.float32]:
        graph = self._manifest.graph
        single = input_ids.shape[1] == 1
        self.steps.append(DECODE if single else PREFILL)
        feeds: dict[str, NDArray[Any]] = {
            graph.input_ids: input_ids,
            graph.start_positions: start_positions,
            graph.token_counts: token_counts,
            graph.logit_positions: logit_positions,
        }
        if self._scratch_plan is not None:
            feeds[BOUNDS] = np.array([input_ids.shape[1], self._scratch_plan.slots], np.int32)
        session = self._decode if single else self._prefill
        binding = session.io_binding()
        taken = {value.name for value in session.get_inputs()}
        for name in feeds.keys() & taken:
            binding.bind_cpu_input(name, feeds[name])
        for ring in self._plan:
            for past, present in ((ring.past_key, ring.present_key), (ring.past_value, ring.present_value)):
                binding.bind_ortvalue_input(past, self._held[past])
                binding.bind_ortvalue_output(present, self._held[past])
        for name, memory in () if single else self._scratch.items():
            binding.bind_ortvalue_output(name, memory)
        binding.bind_output(graph.logits)
        session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()  # what was bound last
        return logits


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(with_paged_body(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
