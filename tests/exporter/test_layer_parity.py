"""Module by module: a right engine is within every budget, a wrong one leaves it where the fault is and not before."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from exporter.layer_parity import compare_layers
from exporter.layer_report import LayerReport, ModuleParity
from exporter.report_html.plots import Mark, error_plot
from exporter.taps import SCOPES, modules_of
from reference.oracle import Oracle
from reference.parity import budget
from reference.watched import WatchedOracle
from runtime.errors import BundleError, CierzoError
from tests.support.bundles import Exported, exported
from tests.support.planted import attribute, planted, with_weights

DENSE = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
MIXTURE = (*DENSE[:6], "moe.router", "moe")


def expected_modules(inner: tuple[str, ...], layers: int) -> list[str]:
    middle = [path for i in range(layers) for path in (*(f"layers.{i}.{name}" for name in inner), f"layers.{i}")]
    return ["embed_tokens", *middle, "norm", "lm_head"]


@pytest.fixture(scope="module")
def dense() -> Exported:
    return exported(num_layers=4, seed=3)


@pytest.fixture(scope="module")
def report(dense: Exported) -> LayerReport:
    return compare_layers(dense.bundle)


def test_every_module_of_a_right_engine_is_within_its_budget(report: LayerReport) -> None:
    assert report.passed
    assert [module.module for module in report.modules] == expected_modules(DENSE, 4)
    assert report.missing == ()
    assert report.first_failure is None
    assert report.tokens > 2 * 5 + 4  # every window is crossed more than twice
    assert not report.capped
    assert [m.depth for m in report.modules if m.module in ("embed_tokens", "layers.2", "norm")] == [0, 3, -1]
    compared = [module for module in report.modules if module.module != "embed_tokens"]
    assert all(0 < module.error <= module.budget for module in compared), "a module that is exact was not compared"


@pytest.mark.parametrize(
    ("settings", "inner"),
    [
        ({"architecture": "mixtral", "num_layers": 2}, MIXTURE),
        ({"architecture": "ministral", "num_layers": 2, "layer_windows": [None, None], "tie": True}, DENSE),
    ],
    ids=["mixture of experts", "full attention, tied"],
)
def test_other_models_have_all_their_modules(settings: dict[str, Any], inner: tuple[str, ...]) -> None:
    context = 29 if settings["architecture"] == "ministral" else None
    report = compare_layers(exported(context=context, **settings).bundle)
    assert report.passed
    assert [module.module for module in report.modules] == expected_modules(inner, 2)


def test_the_budget_is_that_of_the_one_table(dense: Exported, report: LayerReport) -> None:
    row = np.random.default_rng(0).integers(0, dense.opened().config.vocab_size, report.tokens).tolist()
    oracle = Oracle(dense.opened())
    truth, own = ([oracle.logits([row], dtype)[0].numpy()] for dtype in (torch.float64, torch.float32))
    due = budget(truth, own, "float32")
    head = report.modules[-1]
    assert (head.module, head.budget, head.reference_error) == ("lm_head", due.allowed, due.reference_error)


def test_the_watched_reference_is_the_reference(dense: Exported) -> None:
    row = [1, 5, 9, 2, 7, 7, 0]
    stages = list(WatchedOracle(dense.opened()).stages(row, torch.float64))
    assert torch.equal(stages[-1]["lm_head"], Oracle(dense.opened()).logits([row], torch.float64)[0])
    assert [list(stage)[-1] for stage in stages] == ["embed_tokens", *(f"layers.{i}" for i in range(4)), "lm_head"]


def window_of_layer_1(model: onnx.ModelProto) -> None:
    attribute(model, "RollingAttention", "window", 1).i -= 1


def interleaved_heads_of_layer_2(model: onnx.ModelProto) -> None:
    attribute(model, "RollingAttention", "interleaved", 2).i = 1


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (window_of_layer_1, "layers.1.self_attn.o_proj"),
        (interleaved_heads_of_layer_2, "layers.2.self_attn.o_proj"),
    ],
)
def test_a_fault_is_off_from_its_module_on(
    dense: Exported, tmp_path: Path, fault: Callable[[onnx.ModelProto], None], first: str
) -> None:
    report = compare_layers(planted(dense.bundle, tmp_path / "wrong", fault), dense.checkpoint)
    assert not report.passed
    assert report.first_failure is not None
    assert report.first_failure.module == first
    modules = [module.module for module in report.modules]
    assert all(not module.passed for module in report.modules[modules.index("layers.3") :])


def test_wrong_weights_are_off_at_the_module_that_has_them(dense: Exported, tmp_path: Path) -> None:
    wrong = with_weights(dense.bundle, tmp_path / "wrong", "layers.3.mlp.up_proj.weight", [4, 90], 0.3)
    report = compare_layers(wrong, dense.checkpoint)
    assert report.first_failure is not None
    assert report.first_failure.module == "layers.3.mlp.up_proj"


def test_what_is_not_finite_is_off_and_can_be_written(dense: Exported, tmp_path: Path) -> None:
    wrong = with_weights(dense.bundle, tmp_path / "wrong", "layers.1.mlp.up_proj.weight", [0], float("nan"))
    report = compare_layers(wrong, dense.checkpoint)
    assert report.first_failure is not None
    assert report.first_failure.module == "layers.1.mlp.up_proj"
    assert report.first_failure.error == float("inf")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is False


def test_little_memory_compares_fewer_positions_in_more_groups(dense: Exported, report: LayerReport) -> None:
    small = compare_layers(dense.bundle, held_bytes=40_000)
    assert small.passed
    assert small.tokens == report.tokens
    assert 2 <= small.compared_positions < small.tokens
    assert small.groups > 1
    assert f"at {small.compared_positions} positions" in small.what_was_done
    assert [m.module for m in small.modules] == [m.module for m in report.modules]
    whole = {module.module: module for module in report.modules}
    assert all(module.error <= whole[module.module].error for module in small.modules)


def test_a_graph_without_scopes_is_read_by_its_parameters(dense: Exported) -> None:
    model = ir.load(dense.bundle / "model.onnx")
    named = modules_of(model)
    for node in model.graph:
        node.metadata_props.pop(SCOPES)
    found = modules_of(model)
    assert {path for path in found} == {path for path in expected_modules(DENSE, 4) if path.count(".") != 1}, (
        "layers themselves have no parameter"
    )
    assert all(named[path] == value for path, value in found.items())


def test_a_router_that_also_chooses_is_read_at_its_scores() -> None:
    """Another front end has the choice of experts in the router as well, and it is the last thing given out."""
    model = ir.load(exported(num_layers=2, architecture="mixtral").bundle / "model.onnx")
    scores = modules_of(model)["layers.1.moe.router"]
    (gate,) = [node for node in model.graph if node.op_type == "MoEGate" and "layers.1" in str(node.name)]
    gate.metadata_props[SCOPES] = "['', 'layers.1', 'layers.1.moe.router', 'topk']"
    assert modules_of(model)["layers.1.moe.router"] == scores


def test_a_graph_that_names_no_module_is_refused(dense: Exported, tmp_path: Path) -> None:
    def forget(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            del node.metadata_props[:]
        for number, weight in enumerate(model.graph.initializer):
            for node in model.graph.node:
                node.input[:] = [f"w{number}" if name == weight.name else name for name in node.input]
            weight.name = f"w{number}"

    wrong = planted(dense.bundle, tmp_path / "wrong", forget)
    with pytest.raises(BundleError, match="do not say which module they come from"):
        compare_layers(wrong, dense.checkpoint)


def test_without_polygraphy_the_way_out_is_named(dense: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(CierzoError, match=r'pip install "cierzo\[parity\]"'):
        compare_layers(dense.bundle)


def test_the_plot_is_well_formed_and_shows_every_mark() -> None:
    marks = [
        Mark(0.0, 0.0, 1e-6, "exact <&>", True),
        Mark(1.0, 2e-7, 1e-6, "right", True),
        Mark(2.0, float("inf"), 2e-6, "wrong", False),
    ]
    ticks = [(0.0, "a"), (0.001, "too near"), (2.0, "b")]
    figure = ElementTree.fromstring(error_plot(marks, ticks, x_label="depth", y_label="error", title="t"))
    wide, narrow = figure.findall("svg")
    dots, crosses = wide.findall("circle"), [path for path in wide.findall("path") if path.get("class") == "bad"]
    assert [mark.findtext("title") for mark in (*dots, *crosses)] == ["exact <&>", "right", "wrong"]
    heights = [float(dot.get("cy", "nan")) for dot in dots]
    assert heights[0] > heights[1] > float(crosses[0].get("d", "M nan").split()[1].split("l")[0]) >= 0  # up is larger
    for svg in (wide, narrow):
        texts = ["".join(text.itertext()) for text in svg.findall("text")]
        assert {"depth", "error", "budget", "a", "b", "10−7"} <= set(texts)
        assert "too near" not in texts


def test_a_share_of_an_empty_budget_is_none_or_infinite() -> None:
    exact = ModuleParity("m", 0, 0.0, 0.0, 0.0, 0.0, True)
    assert exact.share == 0.0
    assert ModuleParity("m", 0, 1.0, 0.0, 0.0, 0.0, False).share == float("inf")
