"""Quantised bundles are held twice: their engine against their own weights, and these against the original ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from rich.console import Console

from exporter import export
from exporter.cli import cli
from exporter.layer_parity import compare_layers
from exporter.validate import render, validate
from exporter.validation_report import ValidationReport
from runtime.kernels import kernels
from tests.support.bundles import Exported, exported, shared_traces
from tests.support.planted import attribute, planted, with_weights
from tests.support.quantized_checkpoints import Kind, make_quantized

QUALITY = "quality against the original"

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: options of the export, checkpoint
    "int4": ({"weights": "int4"}, {"dtype": "bfloat16"}),
    "int8 and rings of int8": ({"weights": "int8", "kv": "int8"}, {}),
    "int4, zero points, mixture": (
        {"weights": "int4", "zero_points": True, "block_size": 16, "kv": "float32"},
        {"architecture": "mixtral", "dtype": "bfloat16"},
    ),
    "int4, tied": ({"weights": "int4", "block_size": 128}, {"architecture": "qwen3", "tie": True}),
}
NATIVE = [True, False] if kernels() is not None else [False]


def case_of(name: str) -> Exported:
    options, settings = CASES[name]
    return exported(options=options, seed=3, **settings)


def failed(report: ValidationReport) -> list[str]:
    return [check.name for check in report.checks if check.passed is False]


@pytest.mark.parametrize("native", NATIVE, ids=lambda native: "kernels" if native else "bodies")
@pytest.mark.parametrize("name", CASES)
def test_a_right_bundle_passes_both(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("CIERZO_KERNELS", "off")
    case = case_of(name)
    report = validate(case.bundle)
    assert report.passed, failed(report)
    assert report.dtype == "int8"
    assert report.quality is not None
    assert report.quality.kl > 0
    assert report.checks[-1].name == QUALITY
    assert 0 < report.largest_error <= report.budget < 0.2 * report.largest_logit
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["quality"]["tokens"] == 512
    assert compare_layers(case.bundle).passed


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_plain_weights_have_no_quality(kv: str) -> None:
    report = validate(exported(options={"kv": kv}, seed=3).bundle)
    assert report.passed
    assert report.dtype == kv
    assert report.quality is None
    assert report.to_json()["quality"] is None
    assert QUALITY not in [check.name for check in report.checks]


def narrower(model: onnx.ModelProto) -> None:
    for op in ("RollingAttention", "RollingAttentionInt8"):
        for node in model.graph.node:
            if node.op_type == op:
                attribute(model, op, "window", 1).i -= 1
                return


def other_pairs(model: onnx.ModelProto) -> None:
    (op,) = {node.op_type for node in model.graph.node if node.op_type.startswith("RollingAttention")}
    attribute(model, op, "interleaved").i = 1


@pytest.mark.parametrize("fault", [narrower, other_pairs])
@pytest.mark.parametrize("name", CASES)
def test_the_wider_budget_still_sees_a_wrong_graph(
    tmp_path: Path, name: str, fault: Callable[[onnx.ModelProto], None]
) -> None:
    case = case_of(name)
    report = validate(planted(case.bundle, tmp_path / "wrong", fault), case.checkpoint)
    assert any(check.startswith("prompt of") for check in failed(report)), report.budget
    by_module = compare_layers(tmp_path / "wrong", case.checkpoint)
    assert not by_module.passed


def test_broken_scales_are_seen_beside_the_checkpoint_alone(tmp_path: Path) -> None:
    """The engine computes just what its weights say. They are not the checkpoint's any more."""
    case = case_of("int8 and rings of int8")
    scales = "layers.0.self_attn.o_proj.weight.scale"
    wrong = with_weights(case.bundle, tmp_path / "wrong", scales, list(range(32)), 0.1)
    report = validate(wrong, case.checkpoint)
    assert failed(report) == ["quantised weights", QUALITY]
    assert report.quality is not None
    assert report.quality.kl > 0.05


def test_one_wrong_row_is_seen_where_no_text_shows_it(tmp_path: Path) -> None:
    case = case_of("int4")
    packed = "layers.1.mlp.up_proj.weight.packed"
    wrong = with_weights(case.bundle, tmp_path / "wrong", packed, list(range(16)), 119)
    report = validate(wrong, case.checkpoint)
    assert failed(report) == ["quantised weights"]
    assert "a row of layers.1.mlp.up_proj.weight is off by" in report.checks[-2].detail


def test_other_weights_fail_by_quality(tmp_path: Path) -> None:
    case = case_of("int4")
    other = exported(options={"weights": "int4"}, seed=4, dtype="bfloat16")
    assert failed(validate(case.bundle, other.checkpoint))[-1] == QUALITY


def test_a_checkpoint_that_came_quantised(tmp_path: Path) -> None:
    """Copied as it is, so that both comparisons are with the same numbers."""
    source = make_quantized(tmp_path / "checkpoint", Kind("gptq")).packed
    with shared_traces():
        bundle = export(source, tmp_path / "bundle", chunk=4, prove=False)
    report = validate(bundle)
    assert report.passed, failed(report)
    assert report.quality is not None
    assert report.quality.kl < 0.005  # what the engine rounds on the way


def test_the_table_shows_the_quality() -> None:
    console = Console(width=160, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        render(validate(case_of("int4").bundle), console)
    assert "Parity holds" in shown.get()
    assert QUALITY in shown.get()
    assert "the same best token at" in shown.get()


def test_the_page_shows_the_quality(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = CliRunner().invoke(cli, ["validate", str(case_of("int4").bundle), "--report", str(page), "--no-receipt"])
    assert result.exit_code == 0, result.output
    assert QUALITY in page.read_text(encoding="utf-8")
