"""All of Cierzo's operators but attention as those that ONNX Runtime has CUDA kernels for."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.lower.ort.gated_activations import lower_gated_activations
from graph_passes.lower.ort.gated_products import part_gated_products
from graph_passes.lower.ort.mixtures import lower_mixtures
from graph_passes.lower.ort.norms import lower_norms
from graph_passes.lower.ort.products import lower_products
from graph_passes.lower.ort.quantized_products import lower_quantized_products


@dataclass(frozen=True, slots=True)
class OperatorCounts:
    """How many operators were rewritten, by kind."""

    products: int
    quantized_products: int
    norms: int
    gated_activations: int
    mixtures: int


def lower_operators(model: ir.Model) -> OperatorCounts:
    """Rewrite `model` in place, after `unflatten_steps`, in whatever arithmetic it is.

    Weights become inputs of the new nodes in the type that these read, behind a Cast, a Concat or a Reshape of weights
    where they are stored otherwise. Gated activations other than silu keep their bodies. Raises FusionError for what
    the kernels cannot take, as the passes say.
    """
    part_gated_products(model)
    counts = OperatorCounts(
        gated_activations=lower_gated_activations(model),
        norms=lower_norms(model),
        mixtures=lower_mixtures(model),
        quantized_products=lower_quantized_products(model),
        products=lower_products(model),
    )
    model.graph.sort()
    return counts
