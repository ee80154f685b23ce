"""The TensorRT backend: engines that `cierzo build` made, on an NVIDIA GPU.

Two plans share one copy of the weights on the GPU: one for steps of many tokens, one for steps of a single token, which
run as CUDA graphs. The KV buffers stay on the GPU, where each step finds them; what comes back to the host are the
logits that were asked for, or the highest of them.

Letters: B batch rows, T tokens of a step, R of them whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Capabilities, Numerics, TopLogits, TopSteps
from runtime.bundle import Bundle, Progress
from runtime.chunking import Int64Array
from runtime.engine_info import DECODE, PREFILL, EngineInfo
from runtime.errors import BackendError, SessionError
from runtime.profile import StepRun
from runtime.tensorrt.bound import BoundContext
from runtime.tensorrt.device import Device
from runtime.tensorrt.plans import Plan, check_plan
from runtime.tensorrt.rings import writes_in_place
from runtime.tensorrt.rows import Rows
from runtime.tensorrt.staging import Logits
from runtime.tensorrt.weights import refit, upload_weights
from runtime.tensorrt.widths import padded, padded_width

CAPABILITIES = Capabilities(
    name="tensorrt",
    devices=("cuda",),
    kv_dtypes=("float32", "float16"),
    storage_types=("F32", "BF16", "F16", "U8"),
    arithmetic=("float32",),
    engines=True,
)
"""What a bundle may hold; in which types its engines compute was chosen when they were built."""


NONE, ALL = 0, -1
"""How many logits of a token a step brings to the host, besides a number of the highest."""


def open_engine(
    bundle: Bundle,
    *,
    device: str,
    threads: int | None,
    profile: Path | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> TensorRtEngine:
    """Load an engine of the bundle, which must have been built for this machine's GPU, with KV buffers for one row.

    Raises BackendError without a GPU, for `threads` and `profile`, which mean nothing to it, and where no engine fits
    (`choose_engine`); BundleError for an engine that is damaged or not of this bundle.
    """
    if threads is not None:
        raise BackendError(
            f"The backend {CAPABILITIES.name} runs on the GPU, so it has no use for `threads`. Leave it out."
        )
    if profile is not None:
        raise BackendError(
            f"The backend {CAPABILITIES.name} keeps no profile of nodes, because an engine has none of the graph's. "
            "Run the session under NVIDIA's Nsight Systems to see its kernels."
        )
    from runtime.tensorrt.cuda_device import open_device
    from runtime.tensorrt.engine_choice import choose_engine
    from runtime.tensorrt.library_plan import Library

    gpu = open_device()
    built = choose_engine(bundle, engine, gpu.compute_capability, CAPABILITIES.name)
    library = Library(built, gpu)
    plans = {
        kind: library.load(built.plan_file(built.info.plans[kind]), built.info.plans[kind].sha256)
        for kind in (PREFILL, DECODE)
    }
    return TensorRtEngine(bundle, built.info, gpu, plans, progress=progress)


class TensorRtEngine:
    """An Engine (see base.py) of two plans on a GPU.

    Raises BundleError when a plan is not what the manifest and engine.json describe, BackendError when the GPU's memory
    does not suffice or the library fails.
    """

    def __init__(
        self,
        bundle: Bundle,
        info: EngineInfo,
        device: Device,
        plans: Mapping[str, Plan],
        *,
        progress: Progress | None = None,
    ) -> None:
        self._manifest, self._info, self._device, self._plans = bundle.manifest, info, device, plans
        for kind, plan in plans.items():
            check_plan(bundle.manifest, info, kind, plan)
        self._contexts: dict[tuple[str, int], BoundContext] = {}
        self._batch = 1
        self._rows: Rows | None = None
        self._weights = upload_weights(bundle, info, device, progress)
        try:
            refit(bundle, info, plans.values())
            # The plans never run at once, so they share their scratch memory.
            most = max(plan.scratch_bytes(profile) for plan in plans.values() for profile in range(plan.profiles))
            self._scratch = device.allocate(most, f"the intermediate values of a step of {info.chunk} tokens")
            self.allocate(1)
        except BaseException:  # who keeps the error keeps this object as well, and would keep the memory with it
            self._weights.memory.free()
            raise

    @property
    def kernels(self) -> tuple[str, ...]:
        """The plugins of the engine."""
        return self._info.plugins

    @property
    def built(self) -> str:
        """See Engine.built."""
        return self._info.name

    @property
    def device(self) -> str:
        """See Engine.device."""
        return self._device.name

    @property
    def numerics(self) -> Numerics:
        """See Engine.numerics: quantised weights are multiplied with activations as they are."""
        rings = 1 if writes_in_place(self._info) else 2
        return Numerics(self._info.arithmetic, self._info.kv, rounds_activations=False, rings=rings)

    @property
    def notes(self) -> tuple[str, ...]:
        """See Engine.notes."""
        return () if self._rows is None or self._rows.graphs.note is None else (self._rows.graphs.note,)

    @property
    def batch(self) -> int:
        """Rows that the KV buffers hold."""
        return self._batch

    @property
    def kv_bytes(self) -> int:
        """Bytes held for the KV buffers, on the GPU."""
        return 0 if self._rows is None else self._rows.rings.nbytes

    @property
    def top(self) -> TopSteps | None:
        """See Engine.top; None on GPUs that our kernels are not made for."""
        return None if self._rows is None or self._rows.top is None else _TensorRtTop(self, self._rows.top.most)

    def end_profile(self) -> tuple[StepRun, ...]:
        """There is none."""
        return ()

    def allocate(self, batch: int) -> None:
        """Replace the KV buffers by zeroed ones for `batch` rows.

        The old ones go first, since the GPU may not have memory for both. When this raises there are none, and another
        `allocate` must succeed before the next step.
        """
        rows, self._rows = self._rows, None
        self._device.synchronize()
        if rows is not None:
            rows.free()
            del rows
        self._rows = Rows(self._manifest, self._info, self._device, batch)
        self._batch = batch

    def clear(self) -> None:
        """Zero the KV buffers."""
        self._ready().rings.clear()

    def step(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
    ) -> NDArray[np.float32]:
        """Run one step; see Engine.step. The logits returned are a buffer that the next step overwrites."""
        count = logit_positions.shape[1]
        logits, held = self.run(input_ids, start_positions, token_counts, logit_positions, ALL if count else NONE)
        return logits.array(self._batch, held)[:, :count]

    def run(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
        wanted: int,
    ) -> tuple[Logits, int]:
        """Run one step, and give where its logits lie, and of how many tokens of each row: at least of those asked for.

        wanted: how many of each token's logits come to the host: the highest so many, ALL or NONE; only when it is NONE
        the step may still run when this returns.
        """
        rows = self._ready()
        if wanted == NONE:  # no plan gives less than one row of logits
            logit_positions = np.zeros((self._batch, 1), np.int64)
        tokens = padded_width(input_ids.shape[1], self._info.chunk)
        count = logit_positions.shape[1] if logit_positions.shape[1] == 1 else tokens
        input_ids, logit_positions = padded(input_ids, tokens), padded(logit_positions, count)
        kind = DECODE if tokens == 1 else PREFILL
        inputs, logits = rows.inputs[kind], rows.logits(count)
        inputs.fill(input_ids, start_positions, token_counts, logit_positions)

        def queue() -> None:
            context = self._context(kind, tokens)
            for name, address, shape in inputs.places():
                context.set_shape(name, shape)
                context.set_address(name, address)
            for name, shape in rows.rings.shapes():
                context.set_shape(name, shape)
            for name, address in rows.rings.addresses():
                context.set_address(name, address)
            context.set_address(self._manifest.graph.logits, logits.address)
            inputs.send()
            context.enqueue()
            if wanted == ALL:
                logits.fetch(self._batch * count)
            elif wanted != NONE:
                assert rows.top is not None
                rows.top.find(wanted)

        if kind == DECODE:
            rows.graphs.run((wanted, rows.rings.turned), queue)
        else:
            queue()
        rows.rings.roll()
        if wanted == NONE:
            inputs.sent()
        else:
            self._device.synchronize()
        return logits, count

    def run_top(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
        count: int,
    ) -> TopLogits:
        """See TopSteps.step."""
        if logit_positions.shape[1] == 0:
            self.run(input_ids, start_positions, token_counts, logit_positions, NONE)
            return TopLogits(np.empty((self._batch, 0, count), np.float32), np.empty((self._batch, 0, count), np.int64))
        self.run(input_ids, start_positions, token_counts, logit_positions, count)
        top = self._ready().top
        assert top is not None
        return top.array(count)

    def last_logits(self) -> NDArray[np.float32]:
        """All logits [B, 1, V] of the last step that gave one row of them for each row of the batch."""
        logits = self._ready().logits(1)
        logits.fetch(self._batch)
        self._device.synchronize()
        return logits.array(self._batch, 1)

    def _ready(self) -> Rows:
        if self._rows is None:
            raise SessionError(
                "The engine has no KV buffers, because the GPU had no memory for them. Call reset(), or load a new "
                "session and feed fewer rows at once."
            )
        return self._rows

    def _context(self, kind: str, tokens: int) -> BoundContext:
        """The context of a plan's first profile that takes this step; opened when it is needed first."""
        fitting = [
            index
            for index, profile in enumerate(self._info.plans[kind].profiles)
            if profile.min_batch <= self._batch <= profile.max_batch
            and profile.min_tokens <= tokens <= profile.max_tokens
        ]
        if not fitting:
            raise BackendError(
                f"The engine {self._info.name} was built for no step of {self._batch} rows with {tokens} tokens. Build "
                "it again with `cierzo build`."
            )
        index = fitting[0]
        if (kind, index) not in self._contexts:
            context = self._plans[kind].open(index, self._scratch.address, self._scratch.nbytes)
            for name, address in self._weights.addresses.items():
                context.set_address(name, address)
            self._contexts[kind, index] = BoundContext(context, self._device)
        return self._contexts[kind, index]


class _TensorRtTop:
    """See TopSteps."""

    def __init__(self, engine: TensorRtEngine, most: int) -> None:
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
        return self._engine.run_top(input_ids, start_positions, token_counts, logit_positions, count)

    def logits(self) -> NDArray[np.float32]:
        return self._engine.last_logits()
