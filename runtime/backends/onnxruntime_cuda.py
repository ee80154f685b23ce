"""ONNX Runtime on an NVIDIA GPU: engines of ONNX graphs that `cierzo build` made.

Two graphs share one copy of the weights on the GPU: one for steps of many tokens, one for steps of a single token,
which ONNX Runtime captures and launches as a CUDA graph. The KV buffers stay on the GPU, where each step writes into
what it reads; what comes back to the host are the logits that were asked for, or the highest of them, which a third
graph finds.

Letters: B batch rows, T tokens of a step, R of them whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backends.base import Capabilities, Numerics, TopLogits, TopSteps
from runtime.bundle import Bundle, Progress
from runtime.chunking import Int64Array
from runtime.engine_info import INPUT, PREFILL
from runtime.errors import BackendError, SessionError
from runtime.onnxruntime_cuda.engine_choice import choose_step_engine
from runtime.onnxruntime_cuda.highest import most_given
from runtime.onnxruntime_cuda.interface import check_step_graph, check_top_graph
from runtime.onnxruntime_cuda.place import Place
from runtime.onnxruntime_cuda.provider import open_cuda
from runtime.onnxruntime_cuda.rows import Loaded, Rows
from runtime.onnxruntime_cuda.sessions import StepSession
from runtime.onnxruntime_cuda.weights import constant_weights, report_loading, upload_weights
from runtime.profile import StepRun
from runtime.step_engine_info import GRAPHS, TOP, StepEngineInfo

CAPABILITIES = Capabilities(
    name="onnxruntime-cuda",
    devices=("cuda",),
    kv_dtypes=("float32", "float16"),
    storage_types=("F32", "BF16", "F16", "U8"),
    arithmetic=("float32",),
    engines=True,
)
"""What a bundle may hold; in which types its engines compute was chosen when they were built."""


def open_engine(
    bundle: Bundle,
    *,
    device: str,
    threads: int | None,
    profile: Path | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> OnnxRuntimeCudaEngine:
    """Load an engine of the bundle on GPU 0, with KV buffers for one row.

    Raises BackendError where ONNX Runtime cannot use a GPU (`open_cuda`), for `threads` and `profile`, which mean
    nothing to it, and where no engine fits (`choose_step_engine`); BundleError for an engine that is damaged or not of
    this bundle.
    """
    if threads is not None:
        raise BackendError(
            f"The backend {CAPABILITIES.name} runs on the GPU, so it has no use for `threads`. Leave it out."
        )
    if profile is not None:
        raise BackendError(
            f"The backend {CAPABILITIES.name} keeps no profile of nodes, because steps are launched as a whole. Run "
            "the session under NVIDIA's Nsight Systems to see its kernels."
        )
    place = open_cuda()
    built = choose_step_engine(bundle, engine, CAPABILITIES.name, ort.__version__)
    return OnnxRuntimeCudaEngine(bundle, built.info, built.files(), place, progress=progress)


class OnnxRuntimeCudaEngine:
    """An Engine (see base.py) of an engine's graphs on a place. files: by PREFILL, DECODE and TOP.

    Raises BundleError when a graph is not what the manifest and engine.json describe, BackendError when the device's
    memory does not suffice or ONNX Runtime fails.
    """

    def __init__(
        self,
        bundle: Bundle,
        info: StepEngineInfo,
        files: Mapping[str, Path],
        place: Place,
        *,
        progress: Progress | None = None,
    ) -> None:
        self._manifest, self._info, self._device = bundle.manifest, info, place.name
        report = report_loading(info, progress)
        constants = constant_weights(bundle, info, report)
        sessions: dict[str, StepSession] = {}
        self._rows: Rows | None = None
        self._number = 0
        with contextlib.ExitStack() as failing:
            # Who keeps an error keeps this object as well, and would keep the device's memory with it.
            for kind in GRAPHS:
                given = None if kind == TOP else constants
                session = StepSession(files[kind], place, constants=given, captures=kind != PREFILL)
                failing.callback(session.close)
                check = check_top_graph if kind == TOP else check_step_graph
                check(bundle.manifest, info, kind, session.inputs, session.outputs)
                sessions[kind] = session
            del constants, given  # each session holds them in an order of its own now
            self._weights = upload_weights(bundle, info, place.memory, report)
            failing.callback(self._weights.block.free)
            placed = {w.name: (w, self._weights.addresses[w.name]) for w in info.tensors if w.role == INPUT}
            self._loaded = Loaded(bundle.manifest, info, place.memory, sessions, placed)
            self.allocate(1)
            failing.pop_all()

    @property
    def kernels(self) -> tuple[str, ...]:
        """See Engine.kernels: there are none of ours."""
        return ()

    @property
    def built(self) -> str:
        """See Engine.built."""
        return self._info.name

    @property
    def device(self) -> str:
        """See Engine.device."""
        return self._device

    @property
    def numerics(self) -> Numerics:
        """See Engine.numerics: quantised weights are multiplied with activations as they are."""
        return Numerics(
            self._info.arithmetic,
            self._info.kv,
            rounds_activations=False,
            window_slots=0,
            context_slots=self._info.chunk,  # see runtime.step_engine_info
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """See Engine.notes."""
        return ()

    @property
    def batch(self) -> int:
        """Rows that the KV buffers hold."""
        return self._batch

    @property
    def kv_bytes(self) -> int:
        """Bytes held for the KV rings, on the device. Steps of many tokens use other memory besides, where layers have
        a window: as much as the ring of one layer and a chunk."""
        return 0 if self._rows is None else self._rows.rings.nbytes

    @property
    def top(self) -> TopSteps:
        """See Engine.top."""
        return _Top(self, most_given(self._manifest.model.vocab_size))

    def end_profile(self) -> tuple[StepRun, ...]:
        """There is none."""
        return ()

    def allocate(self, batch: int) -> None:
        """Replace the KV buffers by zeroed ones for `batch` rows.

        The old ones go first, since the device may not have memory for both. When this raises there are none, and
        another `allocate` must succeed before the next step.
        """
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.free()
            del rows
        self._number += 1
        self._rows = Rows(self._loaded, batch, self._number)
        self._batch = batch

    def clear(self) -> None:
        """Zero the KV buffers."""
        self.ready().rings.clear()

    def step(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
    ) -> NDArray[np.float32]:
        """Run one step; see Engine.step. The logits returned are a buffer that the next step overwrites."""
        count = self.run(input_ids, start_positions, token_counts, logit_positions)
        if count == 0:
            return np.empty((self._batch, 0, self._manifest.model.vocab_size), np.float32)
        return self.ready().logits(count)

    def run(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
    ) -> int:
        """Run one step, which leaves its logits on the device, and give R."""
        rows, count = self.ready(), int(logit_positions.shape[1])
        if count == 0:  # no graph gives less than one row of logits
            logit_positions = np.zeros((self._batch, 1), np.int64)
        rows.run(input_ids, start_positions, token_counts, logit_positions)
        return count

    def ready(self) -> Rows:
        """What depends on the number of rows. Raises SessionError while there is none."""
        if self._rows is None:
            raise SessionError(
                "The engine has no KV buffers, because the GPU had no memory for them. Call reset(), or load a new "
                "session and feed fewer rows at once."
            )
        return self._rows


class _Top:
    """See TopSteps."""

    def __init__(self, engine: OnnxRuntimeCudaEngine, most: int) -> None:
        self._engine = engine
        self.most = most

    def step(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
        count: int,
    ) -> TopLogits:
        engine = self._engine
        if engine.run(input_ids, start_positions, token_counts, logit_positions) == 0:
            shape = (engine.batch, 0, count)
            return TopLogits(np.empty(shape, np.float32), np.empty(shape, np.int64))
        return engine.ready().highest.find(count, self.logits)

    def logits(self) -> NDArray[np.float32]:
        return self._engine.ready().logits(1)
