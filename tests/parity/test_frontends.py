"""Both front ends, one engine: the same plugin nodes, and the same logits at every border of the window.

The second front end is also held against transformers before any pass has touched its graph, so that a fault of the
tracing and one of a fusion cannot hide each other.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

from exporter.defaults import ATTENTIONS
from exporter.frontends import open_frontend
from exporter.plan import make_plan
from exporter.write import MODEL_FILE
from graph_passes.unbound import is_unbound
from reference.checkpoint import Checkpoint, open_checkpoint
from reference.weights import bind, load_parameter
from tests.support.bundles import Exported, checkpoint, exported, trace_once
from tests.support.checkpoints import load_oracle, oracle_logits
from tests.support.graphs import Arrays, check, run
from tests.support.parity import Judge, boundary_lengths, feed, largest_error, random_rows, uneven_feeds

CHUNK, CONTEXT = 4, 40
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 8.0}

CASES: dict[str, tuple[int | None, dict[str, Any]]] = {
    # name: window of the layers that slide, checkpoint
    "mistral, wide heads, llama3 RoPE, old config": (5, {"head_dim": 12, "rope": LLAMA3, "generation": "old"}),
    "mistral without window, mha, tied, yarn RoPE": (None, {"num_kv_heads": 4, "tie": True, "rope": YARN}),
    "mixtral": (5, {"architecture": "mixtral", "activation": "gelu"}),
    "ministral, mqa": (
        4,
        {"architecture": "ministral", "num_layers": 3, "layer_windows": [4, None, 4], "num_kv_heads": 1},
    ),
}
SAME_IN_BOTH = ("schema_version", "cierzo_version", "model", "graph", "kv", "weights", "tokenizer")


def settings_of(name: str) -> dict[str, Any]:
    window, settings = CASES[name]
    return settings if "layer_windows" in settings else {**settings, "window": window}


def engine(name: str, attention: str | None) -> Exported:
    """The bundle by the front end transformers with this attention, or by the reference for None."""
    frontend = "reference" if attention is None else "transformers"
    return exported(chunk=CHUNK, context=CONTEXT, frontend=frontend, attention=attention, **settings_of(name))


def manifest_of(case: Exported) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((case.bundle / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def with_weights(template: ir.Model, opened: Checkpoint) -> ir.Model:
    """The template with the checkpoint's first layers' weights, which must be exactly the ones that it names."""
    sources = bind(opened)
    for name, value in template.graph.initializers.items():
        if is_unbound(value):
            tensor = load_parameter(opened, sources[name], torch.float32)
            value.const_value = ir.tensor(tensor.numpy(), name=name)
    return template


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_traced_graph_is_the_model_that_was_traced(name: str, attention: str) -> None:
    """As many layers as the template has, no pass, rings full of noise, two rows in uneven steps."""
    settings = settings_of(name)
    kinds = len(dict.fromkeys(settings.get("layer_windows", [0])))
    settings |= {"num_layers": kinds} | ({"layer_windows": [4, None]} if kinds == 2 else {})
    source = checkpoint(**settings)
    opened = open_checkpoint(source)
    plan = make_plan(opened.config, chunk=CHUNK, context=CONTEXT)
    graph = with_weights(trace_once(plan, open_frontend("transformers", attention, opened)), opened)
    check(graph)

    rng = np.random.default_rng(0)
    ids_BT = rng.integers(0, opened.config.vocab_size, (2, 17))
    rings: Arrays = {}
    for kind in range(kinds):
        shape = (2, opened.config.num_kv_heads, plan.capacity(kind), opened.config.head_dim)
        rings |= {f"past.{kind}.{part}": rng.standard_normal(shape, np.float32) for part in ("key", "value")}
    start_B, logits = np.zeros(2, np.int64), np.zeros((2, 17, opened.config.vocab_size), np.float32)
    while (start_B < 17).any():
        count_B = np.minimum(rng.integers(0, CHUNK + 1, 2), 17 - start_B)
        step_BT = np.zeros((2, CHUNK), np.int64)
        for row, (start, count) in enumerate(zip(start_B, count_B, strict=True)):
            step_BT[row, :count] = ids_BT[row, start : start + count]
        feeds = {"input_ids": step_BT, "start_positions": start_B, "token_counts": count_B, **rings}
        feeds["logit_positions"] = np.tile(np.arange(CHUNK), (2, 1))
        outputs = run(graph, feeds)
        for row, (start, count) in enumerate(zip(start_B, count_B, strict=True)):
            logits[row, start : start + count] = outputs["logits"][row, :count]
        rings = {key.replace("present", "past"): ring for key, ring in outputs.items() if key != "logits"}
        start_B = start_B + count_B
    truth = oracle_logits(load_oracle(source), torch.tensor(ids_BT)).numpy()
    np.testing.assert_allclose(logits, truth, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_both_front_ends_give_the_same_plugin_nodes_and_the_same_manifest(name: str) -> None:
    reference = engine(name, None)
    expected = manifest_of(reference)
    for attention in ATTENTIONS:
        case = engine(name, attention)
        manifest = manifest_of(case)
        assert {key: manifest[key] for key in SAME_IN_BOTH} == {key: expected[key] for key in SAME_IN_BOTH}
        assert manifest["fusion"]["nodes"] == expected["fusion"]["nodes"]
        assert manifest["fusion"]["counts"] == expected["fusion"]["counts"]
        assert manifest["files"].keys() == expected["files"].keys()
        assert surface(case.bundle) == surface(reference.bundle)
        provenance, other = manifest["provenance"], expected["provenance"]
        assert provenance["versions"] == other["versions"] | {"transformers": transformers.__version__}
        assert provenance["options"] == other["options"] | {"frontend": "transformers", "attention": attention}
    assert expected["provenance"]["options"].items() >= {"frontend": "reference", "attention": None}.items()


def surface(bundle: Path) -> tuple[object, ...]:
    """What can be seen of a graph from outside, and the plugin nodes in it with their attributes."""
    proto = onnx.load(bundle / MODEL_FILE, load_external_data=False)
    weights = {
        tensor.name: (tuple(tensor.dims), sorted((entry.key, entry.value) for entry in tensor.external_data))
        for tensor in proto.graph.initializer
        if tensor.external_data
    }
    values = [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in (*proto.graph.input, *proto.graph.output)
    ]
    plugins = Counter(
        (node.op_type, *sorted((a.name, str(onnx.helper.get_attribute_value(a))) for a in node.attribute))
        for node in proto.graph.node
        if node.domain
    )
    others = {node.op_type for node in proto.graph.node if not node.domain}
    assert not others & {"MatMul", "Softmax", "Attention", "TopK", "ScatterElements", "GatherND", "Where", "Expand"}
    return weights, values, plugins


@pytest.mark.parametrize("name", CASES)
def test_both_front_ends_at_the_borders_of_the_window(name: str) -> None:
    window, _ = CASES[name]
    lengths = boundary_lengths(window or 4, CHUNK)
    sessions = {attention: engine(name, attention).session() for attention in (None, *ATTENTIONS)}
    judge = Judge(engine(name, None))
    for these in (*([length] for length in lengths), [lengths[-1], 1, lengths[0]], lengths[-3:]):
        rows = random_rows(these, judge.vocab_size, seed=sum(these))
        feeds = uneven_feeds(rows, seed=len(these))
        truth, allowed = judge.truth_and_budget(rows)
        published = judge.transformers(rows)
        logits = {attention: feed(session, feeds) for attention, session in sessions.items()}
        for attention in ATTENTIONS:
            for others in (truth, published, logits[None]):
                assert largest_error(others, logits[attention]) <= allowed.allowed, (these, attention, allowed)
