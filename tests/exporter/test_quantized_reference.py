"""What a bundle's quantised weights stand for, and what its engine rounds, read off its graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from exporter import quantized_reference as module
from exporter.bundle_graph import load_graph
from exporter.quantized_reference import quantized_reference
from reference.weights import EMBEDDING, LM_HEAD, bind, load_parameter
from runtime.bundle import read_bundle
from runtime.errors import BundleError
from tests.support.bundles import Exported, exported

FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    # name: options, largest difference from the original, relative to the largest weight of the parameter
    "int4": ({"weights": "int4"}, 0.15),
    "int4, zero points": ({"weights": "int4", "zero_points": True, "block_size": 16}, 0.15),
    "int8": ({"weights": "int8", "scales": "float32", "block_size": 128}, 0.006),
}
MODELS: dict[str, dict[str, Any]] = {
    "dense, tied": {"dtype": "bfloat16", "architecture": "qwen3", "attention_bias": True, "tie": True},
    "mixture of experts": {"architecture": "mixtral", "intermediate_size": 40},
}


def case_of(model: str, name: str, **more: Any) -> Exported:
    return exported(options={"prove": False, **FORMATS[name][0], **more}, **MODELS[model])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_quantised_weights_as_numbers(model: str, name: str) -> None:
    case = case_of(model, name)
    held, sources = quantized_reference(read_bundle(case.bundle)), bind(case.opened())
    matrices = {parameter for parameter, source in sources.items() if len(source.shape) > 1} | {LM_HEAD}
    assert held.weights.keys() == {m for m in matrices if m != EMBEDDING and "router" not in m}
    for parameter, numbers in held.weights.items():
        source = sources[EMBEDDING if parameter == LM_HEAD and parameter not in sources else parameter]
        original = load_parameter(case.opened(), source, torch.float64)
        got = numbers(torch.float64)
        assert got.dtype == torch.float64
        assert got.shape == original.shape
        error = float((got - original).abs().max() / original.abs().max())
        assert 0 < error < FORMATS[name][1], parameter
        assert torch.equal(numbers(torch.float32).double(), got.float().double())


def test_what_is_rounded_is_what_the_graph_says() -> None:
    case = case_of("mixture of experts", "int4", kv="int8", keep=("lm_head=int8", "layers.0.self_attn.*"))
    rounding = quantized_reference(read_bundle(case.bundle)).rounding
    assert (rounding.kv, rounding.kind) == ("int8", "int8")
    assert rounding.activation_blocks[LM_HEAD] == 32
    assert {name for name in rounding.activation_blocks if name.startswith("layers.0.")} == {
        f"layers.0.moe.{matrix}_proj" for matrix in ("gate", "up", "down")
    }


@pytest.mark.parametrize("kv", ["float32", "float16"])
def test_plain_weights_need_no_graph(kv: str) -> None:
    case = exported(options={"kv": kv})
    with mock.patch.object(module, "load_graph", side_effect=AssertionError):
        held = quantized_reference(read_bundle(case.bundle))
    assert (held.weights, held.rounding.kind) == ({}, kv)


def test_a_graph_without_its_scales_is_refused() -> None:
    bundle = read_bundle(case_of("dense, tied", "int4").bundle)
    graph = load_graph(bundle)
    graph.graph.initializers.pop("lm_head.weight.scale")
    with mock.patch.object(module, "load_graph", return_value=graph):
        held = quantized_reference(replace(bundle))
        with pytest.raises(BundleError, match=r"quantised weights, but not lm_head\.weight\.scale"):
            held.weights[LM_HEAD](torch.float32)
