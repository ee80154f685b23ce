"""What a validation needs of a bundle with quantised weights: them as numbers, and what its engine rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from exporter.bundle_graph import load_graph
from graph_passes.lower.formats import packed_name, scale_name, zero_name
from graph_passes.ops import DOMAIN
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.quantized_moe import QUANTIZED_MIXTURE_OF_EXPERTS
from reference.oracle import Load
from reference.parity import TOLERANCES
from reference.quantized_layout import QuantizedFormat, QuantizedRows, dequantize
from reference.rounding import Rounding
from runtime.backends.base import Numerics
from runtime.bundle import Bundle
from runtime.errors import BundleError

_STACKS = {"gate": 3, "up": 5, "down": 7}
"""Inputs of QuantizedMixtureOfExperts that hold numbers."""


@dataclass(frozen=True, slots=True)
class QuantizedReference:
    """weights: what each quantised parameter stands for. rounding: of activations, and of keys and values."""

    weights: Mapping[str, Load]
    rounding: Rounding


def quantized_reference(bundle: Bundle) -> QuantizedReference:
    """Read the quantised weights' formats off the bundle's graph. Raises BundleError for a graph that has them not."""
    model = load_graph(bundle) if bundle.manifest.weights.types.get("U8") else None
    weights: dict[str, Load] = {}
    blocks: dict[str, int] = {}
    for node in model.graph if model is not None else ():
        if node.domain != DOMAIN or node.op_type not in (QUANTIZED_MATMUL.name, QUANTIZED_MIXTURE_OF_EXPERTS.name):
            continue
        size, bits = node.attributes["block_size"].as_int(), node.attributes["bits"].as_int()
        if node.op_type == QUANTIZED_MATMUL.name:
            columns = {1: node.attributes["K"].as_int()}
        else:
            hidden, intermediate = node.attributes["hidden"].as_int(), node.attributes["intermediate"].as_int()
            columns = dict(zip(_STACKS.values(), (hidden, hidden, intermediate), strict=True))
        for index, width in columns.items():
            parameter = str(getattr(node.inputs[index], "name", "")).removesuffix(packed_name(""))
            assert model is not None
            weights[parameter] = partial(_numbers, model, parameter, bits, size, width)
            blocks[parameter] = size
    return QuantizedReference(weights, Rounding(blocks, bundle.manifest.kv.dtype))


_FROM_FINE_TO_COARSE = tuple(TOLERANCES)
"""Types, in the order of the table."""


def of_engine(numerics: Numerics, of_bundle: Rounding) -> tuple[Rounding, str]:
    """What an engine of the bundle rounds on the way, and the coarsest type in that or in what it computes in."""
    blocks = of_bundle.activation_blocks if numerics.rounds_activations else {}
    rounding = Rounding(blocks, numerics.kv)
    return rounding, max(rounding.kind, numerics.arithmetic, key=_FROM_FINE_TO_COARSE.index)


def _numbers(model: ir.Model, parameter: str, bits: int, block: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    packed = _array(model, packed_name(parameter))
    scale = _array(model, scale_name(parameter))
    zero = _array(model, zero_name(parameter)) if zero_name(parameter) in model.graph.initializers else None
    quantized = QuantizedFormat(bits, block, zero is not None, "F16" if scale.dtype == np.float16 else "F32")
    rows = QuantizedRows(
        torch.tensor(packed).flatten(0, -3),
        torch.tensor(scale).flatten(0, -2),
        None if zero is None else torch.tensor(zero).flatten(0, -2),
    )
    return dequantize(rows, quantized, columns, dtype).view(*packed.shape[:-2], columns)


def _array(model: ir.Model, name: str) -> npt.NDArray[np.generic]:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise BundleError(f"The bundle's graph has quantised weights, but not {name}. Export the checkpoint again.")
    return np.asarray(value.const_value.numpy())
