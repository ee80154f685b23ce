"""The ONNX Runtime backend (CPU).

The KV buffers are bound once, each as an input (`past`) and as the matching output (`present`): the graph writes the
new slots in place and no step copies a buffer. Positions and counts live in two fixed arrays. Only the token ids and
the logits are bound again, and only when the width T of the step, or how many logits R it gives out, changes.

Letters: B batch rows, T tokens of a step, R of them whose logits are asked for, V vocabulary, G KV heads, S slots,
D head dim.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backends.base import Capabilities, Numerics
from runtime.backends.cores import physical_cores
from runtime.backends.memory import available_memory, fits, return_freed_memory
from runtime.backends.onnxruntime_profile import read_profile
from runtime.bundle import Bundle, Progress
from runtime.chunking import Int64Array
from runtime.errors import BackendError, BundleError
from runtime.estimate import estimate, shortage
from runtime.graph_ops import plugin_ops
from runtime.kernels import kernels, why_none
from runtime.manifest import LayerKV, WeightsInfo
from runtime.profile import StepRun
from runtime.rolling_kv import INT8, RollingKV, scale_ring

CAPABILITIES = Capabilities(
    name="onnxruntime",
    devices=("cpu",),
    kv_dtypes=("float32", "float16", "int8"),
    storage_types=("F32", "BF16", "F16", "U8"),
    arithmetic=("float32",),
    threads=True,
)

_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
_MOST_FOLDED = "optimization.constant_folding_max_output_size_in_bytes"
_NO_LIMIT = "0"
_SMALL = str(1 << 20)
"""Below this a constant is folded also where weights are not: shapes, masks and norms cost nothing to keep."""

for _dtype in (np.float16, np.float32, np.float64):
    # numpy works out the limits of a type when it is first asked for them, and warns where denormals are flushed, as
    # they are from the first session on (see `runtime.load`). It keeps what it has found before.
    np.finfo(_dtype)

_ELEMENT_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}


def folding_bytes(weights: WeightsInfo, *, native: bool) -> int:
    """What making the weights gives out: with native kernels, which read stored types, or with the function bodies."""
    return weights.making_bytes if native else weights.folding_bytes


def folds_weights(weights: WeightsInfo, available: int | None, *, native: bool = False) -> bool:
    """Whether making the weights once, at loading, fits into `available` bytes of memory (None: nobody knows).

    Measured on 100M parameters of bfloat16, loading peaks at 1.2 times folding_bytes in a dense model, as packing for
    the kernels copies one matrix at a time, and at 1.1 times in a mixture of experts. Without it a step takes 2.6
    times as long and the memory of its largest temporaries.
    """
    needed = folding_bytes(weights, native=native)
    return needed == 0 or fits(needed + needed // 5, available)


def _made_in_every_step(weights: WeightsInfo, available: int | None, *, native: bool) -> str:
    needed = folding_bytes(weights, native=native)
    return (
        f"Making the weights in {weights.arithmetic} once takes about {needed * 1.2e-9:.1f} GB while "
        f"the engine loads, and {(available or 0) / 1e9:.1f} GB are free, so that every step makes them anew, which "
        "takes about 2.6 times as long at one token a step. More free memory makes it fast."
    )


def open_engine(
    bundle: Bundle,
    *,
    device: str,
    threads: int | None,
    profile: Path | None = None,
    engine: None = None,
    progress: Progress | None = None,
) -> OnnxRuntimeEngine:
    """Load the bundle's graph on `device` (one of CAPABILITIES.devices) with KV buffers for one row."""
    return OnnxRuntimeEngine(bundle, threads=physical_cores() if threads is None else threads, profile=profile)


class OnnxRuntimeEngine:
    """An Engine (see base.py) around one onnxruntime.InferenceSession.

    Raises BackendError when ONNX Runtime cannot load or run the graph, BundleError when the graph's inputs and outputs
    are not those that the manifest describes.

    Weights that are not stored as the graph computes with them are made from the stored ones: once, when the session
    loads, if that fits into the memory that is there (see `folds_weights`), and otherwise in every step anew, layer by
    layer, which is slower and takes no more than the largest of them.
    """

    def __init__(self, bundle: Bundle, *, threads: int, profile: Path | None = None) -> None:
        self._manifest = bundle.manifest
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what it logs as an error it also raises
        # Workers that spin gain up to a tenth on a quiet machine, but burn the cores that a neighbour needs: beside a
        # busy one a token took 17 ms instead of 12.2 (docs/kernels.md).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A peaked softmax yields denormals, which the processor handles 2 to 6 times slower than zeros.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        found = kernels()
        if found is not None:
            options.register_custom_ops_library(str(found.library))
        available = available_memory()
        native = found is not None
        self._folds_weights = folds_weights(bundle.manifest.weights, available, native=native)
        path = bundle.file(bundle.manifest.graph.file)
        ops = plugin_ops(path)
        self._kernels = () if found is None else tuple(op for op in ops if op in found.ops)
        notes = [why_none() if ops and not native else None]
        if not self._folds_weights:
            notes.append(_made_in_every_step(bundle.manifest.weights, available, native=native))
        needed = estimate(bundle.manifest, kernels_active=native, folds=self._folds_weights)
        notes.append(shortage(needed, available))
        self._notes = tuple(note for note in notes if note is not None)
        options.add_session_config_entry(_MOST_FOLDED, _NO_LIMIT if self._folds_weights else _SMALL)
        # A plan puts all values of a step into one block, which is taken beside what was taken without it: 47 MiB in a
        # model of 1B parameters, or every layer's weights where steps make them. Nothing was faster with it.
        options.enable_mem_pattern = False
        if bundle.weights_folder != bundle.path:
            options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(bundle.weights_folder))
        self._profiling = profile is not None
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "profile")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base below Exception
            raise BackendError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from error
        return_freed_memory()
        self._check_interface()
        self.allocate(1)

    @property
    def folds_weights(self) -> bool:
        """Whether weights were made once, at loading, out of the stored ones."""
        return self._folds_weights

    @property
    def kernels(self) -> tuple[str, ...]:
        """See Engine.kernels."""
        return self._kernels

    @property
    def built(self) -> None:
        """See Engine.built: the bundle's own graph runs."""
        return

    @property
    def device(self) -> str:
        """See Engine.device."""
        return CAPABILITIES.devices[0]

    @property
    def numerics(self) -> Numerics:
        """See Engine.numerics."""
        manifest = self._manifest
        quantized = manifest.weights.quantization is not None
        return Numerics(manifest.weights.arithmetic, manifest.kv.dtype, rounds_activations=quantized)

    @property
    def notes(self) -> tuple[str, ...]:
        """See Engine.notes."""
        return self._notes

    @property
    def top(self) -> None:
        """See Engine.top: the logits are on the host anyway."""
        return

    @property
    def batch(self) -> int:
        """Rows that the KV buffers hold."""
        return self._batch

    @property
    def kv_bytes(self) -> int:
        """Bytes held for the KV buffers."""
        return self._kv.nbytes

    @property
    def kv(self) -> RollingKV:
        """The buffers themselves."""
        return self._kv

    def allocate(self, batch: int) -> None:
        """Replace the KV buffers by zeroed ones for `batch` rows and bind them."""
        model, kv, graph = self._manifest.model, self._manifest.kv, self._manifest.graph
        # First, because it is what may not fit into memory; the engine is then as it was.
        self._kv = RollingKV(
            [layer.capacity for layer in kv.layers],
            batch=batch, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=kv.dtype,
        )  # fmt: skip
        self._binding = self._session.io_binding()
        self._batch = batch
        self._start_positions_B = np.zeros(batch, dtype=np.int64)
        self._token_counts_B = np.zeros(batch, dtype=np.int64)
        self._input_ids = np.zeros(batch * kv.chunk, dtype=np.int64)
        self._input_ids_BT = self._input_ids[:0].reshape(batch, 0)
        self._logit_positions = np.zeros(batch * kv.chunk, dtype=np.int64)
        self._logits = np.empty(batch * model.vocab_size, dtype=np.float32)
        self._bind_logits(1)
        # An OrtValue made from a numpy array on the CPU is a view of it, and the binding keeps the OrtValue alive.
        # The arrays themselves must stay alive and in place, which is why they are attributes.
        self._binding.bind_ortvalue_input(graph.start_positions, _view(self._start_positions_B))
        self._binding.bind_ortvalue_input(graph.token_counts, _view(self._token_counts_B))
        for layer, buffers in zip(kv.layers, self._kv.layers, strict=True):
            for (past, present), array in zip(_ring_names(layer, kv.dtype), buffers.arrays, strict=True):
                value = _view(array)
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_ortvalue_output(present, value)

    def end_profile(self) -> tuple[StepRun, ...]:
        """See Engine.end_profile."""
        if not self._profiling:
            return ()
        self._profiling = False
        return read_profile(Path(self._session.end_profiling()))

    def clear(self) -> None:
        """Zero the KV buffers."""
        self._kv.clear()

    def step(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
    ) -> NDArray[np.float32]:
        """Run one step; see Engine.step. The logits returned are a buffer that the next step overwrites."""
        if input_ids.shape[1] != self._input_ids_BT.shape[1]:
            self._bind_tokens(input_ids.shape[1])
        if logit_positions.shape[1] != self._logit_positions_BR.shape[1]:
            self._bind_logits(logit_positions.shape[1])
        self._input_ids_BT[...] = input_ids
        self._start_positions_B[...] = start_positions
        self._token_counts_B[...] = token_counts
        self._logit_positions_BR[...] = logit_positions
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # see __init__
            raise BackendError(f"ONNX Runtime {ort.__version__} failed to run the graph: {error}") from error
        return self._logits_BRV

    def _bind_tokens(self, width: int) -> None:
        """Bind token ids [B, T] for T = width."""
        self._input_ids_BT = self._input_ids[: self._batch * width].reshape(self._batch, width)
        self._binding.bind_ortvalue_input(self._manifest.graph.input_ids, _view(self._input_ids_BT))

    def _bind_logits(self, count: int) -> None:
        """Bind the positions that are asked for [B, R] and their logits [B, R, V] for R = count.

        The logits' memory only ever grows.
        """
        vocab_size, graph = self._manifest.model.vocab_size, self._manifest.graph
        self._logit_positions_BR = self._logit_positions[: self._batch * count].reshape(self._batch, count)
        needed = self._batch * count * vocab_size
        if self._logits.size < needed:
            self._logits = np.empty(needed, dtype=np.float32)
        self._logits_BRV = self._logits[:needed].reshape(self._batch, count, vocab_size)
        self._binding.bind_ortvalue_input(graph.logit_positions, _view(self._logit_positions_BR))
        self._binding.bind_ortvalue_output(graph.logits, _view(self._logits_BRV))

    def _check_interface(self) -> None:
        """Compare names, element types and KV sizes of the graph with the manifest."""
        model, kv, graph = self._manifest.model, self._manifest.kv, self._manifest.graph
        inputs = {argument.name: argument for argument in self._session.get_inputs()}
        outputs = {argument.name: argument for argument in self._session.get_outputs()}
        # A free dimension comes back as a name (str) or None and is compared with nothing.
        expected_inputs: dict[str, tuple[str, list[int | None]]] = {
            graph.input_ids: ("tensor(int64)", [None, None]),
            graph.start_positions: ("tensor(int64)", [None]),
            graph.token_counts: ("tensor(int64)", [None]),
            graph.logit_positions: ("tensor(int64)", [None, None]),
        }
        expected_outputs: dict[str, tuple[str, list[int | None]]] = {
            graph.logits: ("tensor(float)", [None, None, model.vocab_size])
        }
        for layer in kv.layers:
            shape: list[int | None] = [None, model.num_kv_heads, layer.capacity]
            ring, scales = (_ELEMENT_TYPES[kv.dtype], [*shape, model.head_dim]), ("tensor(float)", shape)
            for (past, present), form in zip(_ring_names(layer, kv.dtype), (ring, ring, scales, scales), strict=False):
                expected_inputs[past], expected_outputs[present] = form, form
        for kind, found, expected in (("input", inputs, expected_inputs), ("output", outputs, expected_outputs)):
            if found.keys() != expected.keys():
                different = ", ".join(sorted(found.keys() ^ expected.keys()))
                raise BundleError(
                    f"The {kind}s of {graph.file} are not those of its manifest; they differ in: {different}. "
                    "Export the checkpoint again."
                )
            for name, (element_type, shape) in expected.items():
                argument = found[name]
                fits = len(argument.shape) == len(shape) and all(
                    want is None or not isinstance(have, int) or have == want
                    for have, want in zip(argument.shape, shape, strict=True)
                )
                if argument.type != element_type or not fits:
                    raise BundleError(
                        f"The {kind} {name} of {graph.file} is {argument.type} {argument.shape}, but its manifest "
                        f"describes {element_type} {shape}. Export the checkpoint again."
                    )


def _ring_names(layer: LayerKV, dtype: str) -> list[tuple[str, str]]:
    """Past and present of each ring of a layer, in the order of `LayerBuffers.arrays`."""
    names = [(layer.past_key, layer.present_key), (layer.past_value, layer.present_value)]
    if dtype == INT8:
        names += [(scale_ring(past), scale_ring(present)) for past, present in names]
    return names


def _view(array: NDArray[np.generic]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)
