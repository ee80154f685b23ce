"""A bundle's graph in a bare onnxruntime session: what the product's engine does, with the bindings in our hands."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.backends.cores import physical_cores
from runtime.bundle import read_bundle
from runtime.rolling_kv import RollingKV


@dataclass(frozen=True, slots=True)
class OpTime:
    """All nodes of one operator in one step: how many, and their milliseconds (medians over steps)."""

    op: str
    nodes: int
    milliseconds: float


class RawStep:
    """One row, steps of `width` tokens, same session options as runtime/backends/onnxruntime.py.

    Logits are those of the last token, as a prompt's last step asks for them.

    in_place: bind each past and its present to one buffer; otherwise each to its own, and the results are not fed back.
    profile_folder: measure every node, see `op_times`. rings: the buffers bound as present, keys and values in turn.
    """

    def __init__(
        self, bundle: Path, *, width: int = 1, in_place: bool = True, profile_folder: Path | None = None
    ) -> None:
        opened = read_bundle(bundle)
        manifest = opened.manifest
        model, kv, graph = manifest.model, manifest.kv, manifest.graph
        options = ort.SessionOptions()
        options.intra_op_num_threads = physical_cores()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if profile_folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_folder / "profile")
        path = str(opened.file(graph.file))
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._width = width
        self._start_B = np.zeros(1, dtype=np.int64)
        self._count_B = np.full(1, width, dtype=np.int64)
        ids_BT = np.random.default_rng(0).integers(0, model.vocab_size, (1, width))
        position_BR = np.full((1, 1), width - 1, dtype=np.int64)
        logits_BRV = np.empty((1, 1, model.vocab_size), dtype=np.float32)
        capacities = [layer.capacity for layer in kv.layers]
        sizes = {"batch": 1, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
        past = RollingKV(capacities, dtype=kv.dtype, **sizes)
        present = past if in_place else RollingKV(capacities, dtype=kv.dtype, **sizes)
        self._kept = (ids_BT, position_BR, logits_BRV, past, present)  # a binding is a view of its arrays
        self.rings = [ring for layer in present.layers for ring in (layer.key_BGSD, layer.value_BGSD)]
        view = ort.OrtValue.ortvalue_from_numpy
        for name, array in (
            (graph.input_ids, ids_BT),
            (graph.start_positions, self._start_B),
            (graph.token_counts, self._count_B),
            (graph.logit_positions, position_BR),
        ):
            self._binding.bind_ortvalue_input(name, view(array))
        self._binding.bind_ortvalue_output(graph.logits, view(logits_BRV))
        for layer, old, new in zip(kv.layers, past.layers, present.layers, strict=True):
            for past_name, present_name, source, target in (
                (layer.past_key, layer.present_key, old.key_BGSD, new.key_BGSD),
                (layer.past_value, layer.present_value, old.value_BGSD, new.value_BGSD),
            ):
                self._binding.bind_ortvalue_input(past_name, view(source))
                self._binding.bind_ortvalue_output(present_name, view(target))

    def run(self) -> None:
        """Feed the next `width` tokens."""
        self._session.run_with_iobinding(self._binding)
        self._start_B += self._width

    def output_addresses(self) -> list[int]:
        """Where ONNX Runtime put the presents of the last step."""
        return [value.data_ptr() for value in self._binding.get_outputs()[1:]]

    def op_times(self, skip: int) -> list[OpTime]:
        """End profiling and sum up the nodes by operator, slowest first; the first `skip` steps do not count."""
        file = Path(self._session.end_profiling())
        steps: list[dict[str, list[float]]] = []
        current: dict[str, list[float]] = defaultdict(list)
        for event in sorted(json.loads(file.read_text()), key=lambda event: event["ts"] + event["dur"]):
            if event["name"] == "model_run":
                steps.append(current)
                current = defaultdict(list)
            elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                current[event["args"]["op_name"]].append(event["dur"] / 1e3)
        file.unlink()
        counted = steps[skip:]
        times = [
            OpTime(op, len(counted[0][op]), statistics.median(sum(step[op]) for step in counted)) for op in counted[0]
        ]
        return sorted(times, key=lambda time: -time.milliseconds)
