"""Runs a bundle's graph as it is lowered for engines: by ONNX Runtime, or by ONNX's own evaluator where that is needed.

ONNX Runtime's CPU kernels compute in float32 and float16, not in bfloat16, which the evaluator of the onnx package
does. Both get the weights as the engine's files describe them, so that a test covers these descriptions as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from exporter.build.lower import LoweredGraph, lower_for_engine
from runtime import Session
from runtime.backends.base import Numerics
from runtime.bundle import Bundle, read_bundle
from runtime.chunking import Int64Array
from runtime.engine_info import EngineWeight
from runtime.profile import StepRun
from runtime.weight_expression import pieces
from tests.support.bundles import Exported

Arrays = dict[str, NDArray[Any]]

RING_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
RING_TYPES["float8"] = ml_dtypes.float8_e4m3fn
_ONNX_TYPES = {"F32": 1, "I8": 3, "F16": 10, "BF16": 16, "I4": 22}


def lowered_session(case: Exported, arithmetic: str, kv: str | None = None) -> Session:
    """A session that computes in `arithmetic` with rings of type `kv` (by default the same)."""
    bundle = read_bundle(case.bundle)
    graph = lower_for_engine(bundle, arithmetic, kv or arithmetic)
    return Session(bundle, LoweredEngine(bundle, graph, arithmetic, kv or arithmetic))


def weight_tensor(weight: EngineWeight, bundle: Bundle, orders: Mapping[str, tuple[int, ...]]) -> onnx.TensorProto:
    """The weight as its expression makes it from the bundle's files."""
    data = b"".join(piece.tobytes() for piece in pieces(weight.expression, bundle.file, orders))
    return onnx.TensorProto(name=weight.name, data_type=_ONNX_TYPES[weight.dtype], dims=weight.shape, raw_data=data)


def with_weights(graph: LoweredGraph, bundle: Bundle) -> onnx.ModelProto:
    """The lowered graph with its weights as constants; each must have the type and the shape that the graph reads."""
    model = onnx.load_from_string(graph.onnx)
    inputs = {value.name: value for value in model.graph.input}
    for weight in graph.weights:
        declared = inputs[weight.name]
        assert tuple(extent.dim_value for extent in declared.type.tensor_type.shape.dim) == weight.shape
        model.graph.input.remove(declared)
        model.graph.initializer.append(weight_tensor(weight, bundle, graph.orders))
    return model


class LoweredEngine:
    """An Engine (runtime/backends/base.py) around a lowered graph."""

    built = None
    device = "a double"
    kernels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    top = None

    def __init__(self, bundle: Bundle, graph: LoweredGraph, arithmetic: str, kv: str) -> None:
        self._manifest = bundle.manifest
        self.numerics = Numerics(arithmetic, kv, rounds_activations=False)
        self._ring_type = RING_TYPES[kv]
        model = with_weights(graph, bundle)
        if kv != "float8":  # which GatherElements of opset 24 does not name; engines with such rings have a plugin
            onnx.checker.check_model(model, full_check=True)
        evaluated = arithmetic == "bfloat16" or kv in ("bfloat16", "float8")
        self._run = _evaluator(model) if evaluated else _onnxruntime(model)
        self.allocate(1)

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def kv_bytes(self) -> int:
        return sum(ring.nbytes for ring in self._rings.values())

    def end_profile(self) -> tuple[StepRun, ...]:
        return ()

    def allocate(self, batch: int) -> None:
        self._batch = batch
        model = self._manifest.model
        self._rings: Arrays = {
            name: np.zeros((batch, model.num_kv_heads, layer.capacity, model.head_dim), self._ring_type)
            for layer in self._manifest.kv.layers
            for name in (layer.past_key, layer.past_value)
        }

    def clear(self) -> None:
        self.allocate(self._batch)

    def step(
        self, input_ids: Int64Array, start_positions: Int64Array, token_counts: Int64Array, logit_positions: Int64Array
    ) -> NDArray[np.float32]:
        graph = self._manifest.graph
        feeds = {
            graph.input_ids: input_ids,
            graph.start_positions: start_positions,
            graph.token_counts: token_counts,
            graph.logit_positions: logit_positions,
        }
        results = self._run({**feeds, **self._rings})
        for layer in self._manifest.kv.layers:
            self._rings[layer.past_key] = results[layer.present_key]
            self._rings[layer.past_value] = results[layer.present_value]
        logits: NDArray[np.float32] = results[graph.logits]
        return logits


def _evaluator(model: onnx.ModelProto) -> Callable[[Arrays], Arrays]:
    evaluator = ReferenceEvaluator(model)
    return lambda feeds: dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def _onnxruntime(model: onnx.ModelProto) -> Callable[[Arrays], Arrays]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))
