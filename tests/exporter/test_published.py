"""The graphs of published models, at full size and without a single weight: fused, proved and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.bisect.stages import plan_of, rebuild
from exporter.compile import build_graph, expected_nodes
from exporter.frontends import transformers_frontend
from exporter.plan import make_plan
from graph_passes.prove import TOLERANCES
from reference.config import ModelConfig
from runtime.bundle import read_bundle
from tests.support.bundles import exported

CONFIGS = Path(__file__).parents[1] / "support" / "configs"


@pytest.mark.parametrize(
    "name",
    [
        "Mistral-7B-v0.1",
        "Mistral-Nemo-12B",
        "Mixtral-8x22B",
        "Llama-2-7B",  # as many KV heads as heads: the largest rings of all, which no probe may allocate
        "Ministral-3-8B",
        "Qwen3-30B-A3B",
    ],
)
def test_a_published_model_fuses_at_full_size(name: str) -> None:
    config = ModelConfig.from_hf(json.loads((CONFIGS / f"{name}.json").read_text()), text_only=True)
    plan = make_plan(config)
    model, report = build_graph(plan)
    counts = {op: sum(node.op_type == op for node in model.graph) for op in expected_nodes(plan)}
    assert counts == expected_nodes(plan)
    layers = config.num_layers
    assert counts["RollingAttention"] == layers
    assert counts["RMSNorm"] == (4 if config.qk_norm else 2) * layers + 1
    assert not {"MatMul", "Gemm", "ReduceMean", "Softmax", "ScatterElements"} & {n.op_type for n in model.graph}
    assert counts["MixtureOfExperts"] == (layers if config.moe else 0)
    assert report.largest_error is not None
    assert report.largest_error <= TOLERANCES["float64"]
    rings = [v for v in model.graph.inputs if str(v.name).startswith("past.")]
    assert len(rings) == 2 * layers
    for ring in rings:
        assert ring.shape is not None
        assert list(ring.shape)[1:] == [config.num_kv_heads, plan.capacity(0), config.head_dim]


def test_a_published_mixture_fuses_as_transformers_spells_it() -> None:
    """Its experts gather whole matrices for each token, so no region of it could be run at full size."""
    published = json.loads((CONFIGS / "Mixtral-8x7B.json").read_text())
    plan = make_plan(ModelConfig.from_hf(published))
    model, report = build_graph(plan, frontend=transformers_frontend(published, "sdpa"))
    counts = {op: sum(node.op_type == op for node in model.graph) for op in expected_nodes(plan)}
    assert counts == expected_nodes(plan)
    assert report.largest_error is not None
    assert report.largest_error <= TOLERANCES["float64"]
    experts = model.graph.initializers["layers.31.moe.down_proj"]
    assert list(experts.shape or ()) == [8, 4096, 14336]


def test_only_large_mixtures_have_a_twin() -> None:
    plans = {
        name: make_plan(ModelConfig.from_hf(json.loads((CONFIGS / f"{name}.json").read_text())))
        for name in ("Mixtral-8x7B", "Mistral-7B-v0.1")
    }
    assert plans["Mistral-7B-v0.1"].twin is None
    twin = plans["Mixtral-8x7B"].twin
    assert twin is not None
    assert twin.twin is None
    full = replace(twin.config, hidden_size=4096, intermediate_size=14336)
    assert replace(twin, config=full) == plans["Mixtral-8x7B"]
    others = {twin.config.num_heads, twin.config.num_kv_heads, twin.config.head_dim, twin.config.vocab_size}
    assert len({twin.config.hidden_size, twin.config.intermediate_size} - others) == 2


def test_bisect_matches_large_experts_on_their_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformers' region holds its sizes, so that what is too large to be run has no other way to a node."""
    large = exported(num_layers=1, architecture="mixtral", frontend="transformers")
    for module in ("exporter.plan", "graph_passes.ops.moe"):
        monkeypatch.setattr(f"{module}.MOST_NUMBERS", 5000)
    opened, bundle = large.opened(), read_bundle(large.bundle)
    plan = plan_of(bundle, opened)
    assert plan.twin is not None
    finished = rebuild(bundle, opened, plan).stages[-1].model
    assert "MixtureOfExperts" in {node.op_type for node in finished.graph}
