"""A bundle's graph as two graphs for a GPU, of what ONNX Runtime's CUDA provider runs: many tokens a step, and one.

Neither holds a weight, and both ask for the same ones: weights become inputs before the two part.

Letters: B batch rows, T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import onnx
import onnx_ir as ir

from exporter.build.cuda_placement import flat
from exporter.build.lower import refuse_bundle
from exporter.build.weights_as_inputs import Reader, WeightInputs, check_weight
from exporter.bundle_graph import load_graph
from graph_passes.lower.arithmetic import ARITHMETIC, lower_arithmetic
from graph_passes.lower.bodies import refresh_bodies
from graph_passes.lower.ort.attention import lower_attention
from graph_passes.lower.ort.decode import specialize_decode
from graph_passes.lower.ort.operators import lower_operators
from graph_passes.lower.ort.steps import unflatten_steps
from graph_passes.lower.ort.unused import remove_unused
from graph_passes.lower.packed_attention import pack_attention
from graph_passes.lower.products import merge_products
from runtime.bundle import Bundle
from runtime.engine_info import DECODE, PREFILL, EngineWeight
from runtime.errors import BackendError
from runtime.step_engine_info import CONSTANT, Scratch, StepRing

_READERS = {("com.microsoft", "QMoE"): Reader(computed=(), role=CONSTANT)}
"""QMoE orders its numbers anew when a session is made, and takes nothing else for that than constants."""

NOWHERE = "given when a session is made"
"""Where a graph says that its constants lie: no file is called so, and a session is given them instead."""


@dataclass(frozen=True, slots=True)
class StepGraphs:
    """Two ONNX models without function bodies, what they ask for, and the rings that they share.

    prefill: input_ids [B, T], start_positions [B], token_counts [B], logit_positions [B, R], attention_bounds where
    there is scratch memory, rings, weights; logits float32 [B, R, V] and the rings after the step. decode: input_ids
    [B, 1], start_positions [B], rings, weights; logits float32 [B, 1, V], rings. orders: index lists that expressions
    of weights name.
    """

    prefill: bytes
    decode: bytes
    weights: tuple[EngineWeight, ...]
    orders: Mapping[str, tuple[int, ...]]
    rings: tuple[StepRing, ...]
    scratch: Scratch | None


def lower_for_steps(bundle: Bundle, arithmetic: str) -> StepGraphs:
    """The graphs of `bundle` with products, keys and values in `arithmetic`, a key of ARITHMETIC.

    Inputs and outputs keep the names of the manifest; rings have the layout of `StepRing`. Weights that are rounded
    into a type of less range are read once. Raises BackendError for what no engine can take in that arithmetic,
    BundleError for weights whose numbers it does not hold, FusionError as the passes do.
    """
    if arithmetic not in ARITHMETIC:
        raise BackendError(f"An engine computes in {', '.join(ARITHMETIC)}, not in {arithmetic}.")
    chunk = bundle.manifest.kv.chunk
    model = load_graph(bundle)
    refuse_bundle(model, bundle, arithmetic)
    refresh_bodies(model)
    lower_arithmetic(model, arithmetic, arithmetic)
    merge_products(model)
    pack_attention(model)
    unflatten_steps(model)
    lower_operators(model)
    weights = WeightInputs(model, _READERS)
    weights.detach_all()
    for weight in weights.made():
        check_weight(bundle, weight, weights.orders)
    decode = model.clone()
    specialize_decode(decode)
    lower_attention(decode, DECODE, chunk)
    plan = lower_attention(model, PREFILL, chunk)
    graph = bundle.manifest.graph
    remove_unused(model, {graph.token_counts, graph.logit_positions})  # part of what a step is given, read or not
    remove_unused(decode)
    return StepGraphs(
        prefill=_finished(model, weights.made()),
        decode=_finished(decode, weights.made()),
        weights=weights.made(),
        orders=weights.orders,
        rings=tuple(StepRing(**asdict(ring)) for ring in plan.rings),
        scratch=None if plan.scratch is None else Scratch(**asdict(plan.scratch)),
    )


def _finished(model: ir.Model, weights: Sequence[EngineWeight]) -> bytes:
    """The model's bytes, without function bodies, and with constants that lie NOWHERE."""
    proto = flat(ir.to_proto(model))
    constants = {weight.name for weight in weights if weight.role == CONSTANT}
    inputs = list(proto.graph.input)
    del proto.graph.input[:]
    for value in inputs:
        if value.name not in constants:
            proto.graph.input.append(value)
            continue
        kind = value.type.tensor_type
        extents = [extent.dim_value for extent in kind.shape.dim]
        tensor = onnx.TensorProto(name=value.name, data_type=kind.elem_type, dims=extents)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=NOWHERE)
        proto.graph.initializer.append(tensor)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content
