"""A bundle's graph as an engine is built from it: in the engine's arithmetic, and with every weight as an input.

The graph that leaves here holds no weight at all. The builder decides what an input becomes: it stays one, which all
plans of an engine read from one place, or it is replaced by a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from exporter.build.weights_as_inputs import Reader, WeightInputs, check_weight
from exporter.bundle_graph import load_graph
from graph_passes.lower.arithmetic import ARITHMETIC, RINGS, lower_arithmetic
from graph_passes.lower.bodies import refresh_bodies
from graph_passes.lower.dequantize import dequantize_products
from graph_passes.lower.packed_attention import pack_attention
from graph_passes.lower.products import merge_products
from graph_passes.ops.base import DOMAIN
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8
from graph_passes.ops.stored_matmul import STORED_MATMUL
from runtime.bundle import Bundle
from runtime.engine_info import EngineWeight
from runtime.errors import BackendError

_READERS = {
    (DOMAIN, STORED_MATMUL.name): Reader(computed=(1,)),
    (DOMAIN, MIXTURE_OF_EXPERTS.name): Reader(computed=(3, 4, 5)),
}


@dataclass(frozen=True, slots=True)
class LoweredGraph:
    """onnx: the model's bytes. weights: its inputs beyond the bundle's. orders: index lists that expressions name."""

    onnx: bytes
    weights: tuple[EngineWeight, ...]
    orders: Mapping[str, tuple[int, ...]]


def lower_for_engine(bundle: Bundle, arithmetic: str, kv: str) -> LoweredGraph:
    """The graph of `bundle` with products in `arithmetic` and rings of type `kv` (keys of ARITHMETIC and RINGS).

    Inputs and outputs keep the names of the manifest; logits are float32. Weights that are rounded into a type of less
    range are read once. Raises BackendError for what no engine can take in that arithmetic, BundleError for weights
    whose numbers it does not hold, FusionError as the passes do.
    """
    if arithmetic not in ARITHMETIC or kv not in RINGS:
        raise BackendError(
            f"An engine computes in {', '.join(ARITHMETIC)} with rings of {', '.join(RINGS)}, not in {arithmetic} with "
            f"{kv}."
        )
    model = load_graph(bundle)
    refuse_bundle(model, bundle, arithmetic)
    refresh_bodies(model)
    lower_arithmetic(model, arithmetic, kv)
    merge_products(model)
    pack_attention(model)
    weights = WeightInputs(model, _READERS)
    dequantize_products(model, ARITHMETIC[arithmetic], weights.bind)
    weights.detach_all()
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    if kv == "float8":
        _mark_what_is_beyond(model)
    for weight in weights.made():
        check_weight(bundle, weight, weights.orders)
    return LoweredGraph(ir.to_proto(model).SerializeToString(deterministic=True), weights.made(), weights.orders)


def refuse_bundle(model: ir.Model, bundle: Bundle, arithmetic: str) -> None:
    """Raises BackendError for a bundle whose rings or quantised weights no engine of that arithmetic takes."""
    if any((node.domain, node.op_type) == (DOMAIN, ROLLING_ATTENTION_INT8.name) for node in model.graph):
        raise BackendError(
            f"The bundle {bundle.path} has int8 KV buffers, and this backend keeps its own kinds. Export the "
            "checkpoint with --kv float16 (kv='float16')."
        )
    quantization = bundle.manifest.weights.quantization
    if quantization is not None and quantization.scales != arithmetic:
        raise BackendError(
            f"The bundle's quantised weights have {quantization.scales} scales, and products with them are computed in "
            f"the type of the scales, not in {arithmetic}. Build with --arithmetic float16 from a bundle with float16 "
            "scales, which is what an export writes by default."
        )


def _mark_what_is_beyond(model: ir.Model) -> None:
    """Numbers that e4m3 cannot hold become NaN in a ring, not its largest number, as in Cierzo's kernels."""
    for function in model.functions.values():
        for node in function if function.name == ROLLING_ATTENTION.name else ():
            like = node.inputs[1] if node.op_type == "CastLike" else None
            if like is not None and like.name in ROLLING_ATTENTION.inputs[5:7]:
                node.attributes["saturate"] = ir.AttrInt64("saturate", 0)
