"""The ONNX Runtime backend (CPU).

The KV buffers are bound once, each as an input (`past`) and as the matching output (`present`): the graph writes the
new slots in place and no step copies a buffer. Positions and counts live in two fixed arrays. Only the token ids and
the logits are bound again, and only when the width T of the step changes.

Letters: B batch rows, T tokens of a step, V vocabulary, G KV heads, S slots, D head dim.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backends.base import Capabilities
from runtime.backends.cores import physical_cores
from runtime.backends.memory import available_memory, fits, return_freed_memory
from runtime.bundle import Bundle
from runtime.chunking import Int64Array
from runtime.errors import BackendError, BundleError
from runtime.kernels import kernels
from runtime.manifest import WeightsInfo
from runtime.rolling_kv import RollingKV

CAPABILITIES = Capabilities(
    name="onnxruntime",
    devices=("cpu",),
    kv_dtypes=("float32",),
    storage_types=("F32", "BF16", "F16"),
    arithmetic=("float32",),
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

_ELEMENT_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)"}


def folds_weights(weights: WeightsInfo, available: int | None) -> bool:
    """Whether making the weights once, at loading, fits into `available` bytes of memory (None: nobody knows).

    Measured on 100M parameters of bfloat16, loading peaks at 1.2 times folding_bytes in a dense model, as packing for
    the kernels copies one matrix at a time, and at 1.1 times in a mixture of experts. Without it a step takes 2.6
    times as long and the memory of its largest temporaries.
    """
    return weights.folding_bytes == 0 or fits(weights.folding_bytes + weights.folding_bytes // 5, available)


def _made_in_every_step(weights: WeightsInfo, available: int | None) -> str:
    return (
        f"Making the weights in {weights.arithmetic} once takes about {weights.folding_bytes * 1.2e-9:.1f} GB while "
        f"the engine loads, and {(available or 0) / 1e9:.1f} GB are free, so that every step makes them anew, which "
        "takes about 2.6 times as long at one token a step. More free memory makes it fast."
    )


def open_engine(bundle: Bundle, *, device: str, threads: int | None) -> OnnxRuntimeEngine:
    """Load the bundle's graph on `device` (one of CAPABILITIES.devices) with KV buffers for one row."""
    return OnnxRuntimeEngine(bundle, threads=physical_cores() if threads is None else threads)


class OnnxRuntimeEngine:
    """An Engine (see base.py) around one onnxruntime.InferenceSession.

    Raises BackendError when ONNX Runtime cannot load or run the graph, BundleError when the graph's inputs and outputs
    are not those that the manifest describes.

    Weights that are not stored as the graph computes with them are made from the stored ones: once, when the session
    loads, if that fits into the memory that is there (see `folds_weights`), and otherwise in every step anew, layer by
    layer, which is slower and takes no more than the largest of them.
    """

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._manifest = bundle.manifest
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what it logs as an error it also raises
        # Spinning workers burn the cores that a neighbour needs: measured 13.7 against 7.4 tokens/s with one busy
        # neighbour, and nothing lost on a quiet machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A peaked softmax yields denormals, which the processor handles 2 to 6 times slower than zeros.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        available = available_memory()
        self._folds_weights = folds_weights(bundle.manifest.weights, available)
        self._notes: tuple[str, ...] = ()
        if not self._folds_weights:
            self._notes = (_made_in_every_step(bundle.manifest.weights, available),)
        options.add_session_config_entry(_MOST_FOLDED, _NO_LIMIT if self._folds_weights else _SMALL)
        # A plan of one block for all values of a step would hold every layer's weights at once.
        options.enable_mem_pattern = self._folds_weights
        if bundle.weights_folder != bundle.path:
            options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(bundle.weights_folder))
        path = bundle.file(bundle.manifest.graph.file)
        found = kernels()
        if found is not None:
            options.register_custom_ops_library(str(found.library))
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
    def notes(self) -> tuple[str, ...]:
        """See Engine.notes."""
        return self._notes

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
        self._logits = np.empty(0, dtype=np.float32)
        self._input_ids_BT = self._input_ids[:0].reshape(batch, 0)
        self._logits_BTV = self._logits.reshape(batch, 0, model.vocab_size)
        # An OrtValue made from a numpy array on the CPU is a view of it, and the binding keeps the OrtValue alive.
        # The arrays themselves must stay alive and in place, which is why they are attributes.
        self._binding.bind_ortvalue_input(graph.start_positions, _view(self._start_positions_B))
        self._binding.bind_ortvalue_input(graph.token_counts, _view(self._token_counts_B))
        for layer, buffers in zip(kv.layers, self._kv.layers, strict=True):
            for past, present, array in (
                (layer.past_key, layer.present_key, buffers.key_BGSD),
                (layer.past_value, layer.present_value, buffers.value_BGSD),
            ):
                value = _view(array)
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_ortvalue_output(present, value)

    def clear(self) -> None:
        """Zero the KV buffers."""
        self._kv.clear()

    def step(self, input_ids: Int64Array, start_positions: Int64Array, token_counts: Int64Array) -> NDArray[np.float32]:
        """Run one step; see Engine.step. The logits returned are a buffer that the next step overwrites."""
        if input_ids.shape[1] != self._input_ids_BT.shape[1]:
            self._bind_width(input_ids.shape[1])
        self._input_ids_BT[...] = input_ids
        self._start_positions_B[...] = start_positions
        self._token_counts_B[...] = token_counts
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # see __init__
            raise BackendError(f"ONNX Runtime {ort.__version__} failed to run the graph: {error}") from error
        return self._logits_BTV

    def _bind_width(self, width: int) -> None:
        """Bind token ids [B, T] and logits [B, T, V] for T = width; the logits' memory only ever grows."""
        vocab_size, graph = self._manifest.model.vocab_size, self._manifest.graph
        self._input_ids_BT = self._input_ids[: self._batch * width].reshape(self._batch, width)
        needed = self._batch * width * vocab_size
        if self._logits.size < needed:
            self._logits = np.empty(needed, dtype=np.float32)
        self._logits_BTV = self._logits[:needed].reshape(self._batch, width, vocab_size)
        self._binding.bind_ortvalue_input(graph.input_ids, _view(self._input_ids_BT))
        self._binding.bind_ortvalue_output(graph.logits, _view(self._logits_BTV))

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
        }
        expected_outputs: dict[str, tuple[str, list[int | None]]] = {
            graph.logits: ("tensor(float)", [None, None, model.vocab_size])
        }
        for layer in kv.layers:
            ring: tuple[str, list[int | None]] = (
                _ELEMENT_TYPES[kv.dtype],
                [None, model.num_kv_heads, layer.capacity, model.head_dim],
            )
            expected_inputs |= {layer.past_key: ring, layer.past_value: ring}
            expected_outputs |= {layer.present_key: ring, layer.present_value: ring}
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


def _view(array: NDArray[np.generic]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)
