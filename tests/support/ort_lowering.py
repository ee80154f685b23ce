"""A bundle's graph as the passes for ONNX Runtime get it, with its weights in memory, and steps to run it with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from exporter.bundle_graph import load_graph
from graph_passes.lower.arithmetic import lower_arithmetic
from graph_passes.lower.bodies import refresh_bodies
from graph_passes.lower.packed_attention import pack_attention
from graph_passes.lower.products import merge_products
from runtime.bundle import read_bundle
from tests.support.bundles import exported
from tests.support.graphs import Arrays, parse

WINDOW, CHUNK, VOCABULARY = 5, 4, 64
_QUANTIZED = {"zero_points": True, "scales": "float32"}
MODELS: dict[str, dict[str, Any]] = {
    "window": {},
    "no window, biases, tied": {"architecture": "qwen2", "window": None, "context": 40, "tie": True},
    "norms of heads, experts": {"architecture": "qwen3_moe"},
    "queries scaled by their positions": {"architecture": "ministral3"},
    "traced from transformers": {"frontend": "transformers"},
    "experts, traced from transformers": {"architecture": "mixtral", "frontend": "transformers", "top_k": 3},
    "quantised": {"options": {"weights": "int8", **_QUANTIZED}},
    "quantised experts": {
        "architecture": "mixtral", "hidden_size": 64, "intermediate_size": 64,
        "options": {"weights": "int4", **_QUANTIZED},
    },
}  # fmt: skip
"""Settings of `exported`: every way in which a graph of the family differs from the others."""


def lowered_graph(arithmetic: str = "float32", **settings: Any) -> ir.Model:
    """The graph of `exported(**settings)` in `arithmetic`; weights have their numbers."""
    case = exported(**{"window": WINDOW, "chunk": CHUNK, **settings})
    model = load_graph(read_bundle(case.bundle))
    refresh_bodies(model)
    lower_arithmetic(model, arithmetic, arithmetic)
    merge_products(model)
    pack_attention(model)
    return with_numbers(model)


def with_numbers(model: ir.Model) -> ir.Model:
    """The model, its initializers read from the bundle's files."""
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), value.const_value.dtype, name=name)
    return model


def a_step(model: ir.Model, tokens: int = 3, asked: int = 2, batch: int = 2, seed: int = 0) -> Arrays:
    """Inputs of a step of `model`: rows that have begun at several places, rings full of numbers."""
    rng = np.random.default_rng(seed)
    given: Arrays = {
        "input_ids": rng.integers(0, VOCABULARY, (batch, tokens)),
        "start_positions": np.arange(batch) * 7,
        "token_counts": np.full(batch, tokens),
        "logit_positions": rng.integers(0, tokens, (batch, asked)),
    }
    feeds: Arrays = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name in given:
            feeds[name] = given[name].astype(np.int64)
            continue
        assert value.shape is not None
        assert value.dtype is not None
        extents = [batch, *(extent for extent in value.shape if isinstance(extent, int))]
        feeds[name] = rng.standard_normal(extents).astype(value.dtype.numpy())
    return feeds


def small(text: str) -> ir.Model:
    """A graph of Cierzo's operators as text, with their function bodies, and types and shapes of all its values."""
    model = parse(text)
    refresh_bodies(model)
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=False, strict_mode=False)
    return ir.from_proto(inferred)


def exact_products(model: ir.Model) -> ir.Model:
    """The model with quantised products in its bodies that do not round rows to 8 bits, which others do not do."""
    for function in model.functions.values():
        for node in function:
            if node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return model
