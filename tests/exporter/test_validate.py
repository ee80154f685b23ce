"""Validation passes what is right, and names what is wrong: every fault here is planted in a bundle that loads."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from rich.console import Console

from exporter import export
from exporter.cli import cli
from exporter.validate import render, validate
from exporter.validation_report import Check, ValidationReport
from runtime.errors import BackendError, CheckpointError
from runtime.kernels import kernels
from tests.support.checkpoints import make_checkpoint
from tests.support.planted import attribute, planted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), window=5, num_layers=2, seed=3)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("bundles") / "right", chunk=4)


@pytest.fixture(scope="module")
def report(bundle: Path) -> ValidationReport:
    return validate(bundle)


def change_window(by: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        attribute(model, "RollingAttention", "window", 1).i += by

    return change


def no_window(model: onnx.ModelProto) -> None:
    attribute(model, "RollingAttention", "window").i = 0


def change_scale(model: onnx.ModelProto) -> None:
    attribute(model, "RollingAttention", "scale").f *= 1.001


def interleave(model: onnx.ModelProto) -> None:
    attribute(model, "RollingAttention", "interleaved").i = 1


def swap_start_and_count(model: onnx.ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "RollingAttention"][1]
    node.input[7], node.input[8] = node.input[8], node.input[7]


FAULTS = {
    "window + 1": change_window(1),
    "window - 1": change_window(-1),
    "no window": no_window,
    "scale": change_scale,
    "interleaved": interleave,
    "slot of the wrong position": swap_start_and_count,
}


def test_the_right_bundle_passes(report: ValidationReport) -> None:
    assert report.passed
    assert all(check.passed for check in report.checks)
    assert 0 < report.largest_error <= report.budget
    names = [check.name for check in report.checks]
    # W = 5, C = 4: W − 1, W, W + 1, 2W + 1, 3W + C
    assert {f"prompt of {n}" for n in (4, 5, 6, 11, 19)} <= set(names)
    assert {
        "uneven pieces",
        "last tokens",
        "one at a time",
        "ragged batch, row 2",
        "receptive field",
        "KV memory",
    } <= set(names)
    assert len(report.position_errors) == 19


REFUSED = {"window + 1", "no window", "slot of the wrong position"}
"""Faults that native kernels refuse to run: the ring does not hold such a window, or there are no such positions."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(
    bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    wrong = planted(bundle, tmp_path / "wrong", FAULTS[fault])
    if kernels() is not None:
        if fault in REFUSED:
            with pytest.raises(BackendError, match="RollingAttention"):
                validate(wrong, checkpoint)
        else:
            assert not validate(wrong, checkpoint).passed
    monkeypatch.setenv("CIERZO_KERNELS", "off")
    report = validate(wrong, checkpoint)
    assert not report.passed
    failed = [check.name for check in report.checks if check.passed is False]
    assert any(name.startswith(("prompt of", "one at a time", "ragged", "uneven")) for name in failed), failed
    if fault == "window + 1":
        assert "receptive field" in failed


def test_rings_of_another_size_than_the_windows_need_fail(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The same numbers in too much memory: held against the checkpoint's windows, not against what the bundle says."""

    def widen(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if ".key" in value.name or ".value" in value.name:
                value.type.tensor_type.shape.dim[2].dim_value = 64
        del model.graph.value_info[:]

    wide = planted(bundle, tmp_path / "wide", widen)
    manifest = json.loads((wide / "manifest.json").read_text())
    for layer in manifest["kv"]["layers"]:
        layer |= {"window": 61, "capacity": 64}
    (wide / "manifest.json").write_text(json.dumps(manifest))
    report = validate(wide, checkpoint)
    failed = [check.name for check in report.checks if check.passed is False]
    assert failed == ["declared windows", "KV memory"]


def test_other_weights_fail(bundle: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, window=5, num_layers=2, seed=4)
    assert not validate(bundle, other).passed


def test_another_model_cannot_be_compared(bundle: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, window=5, num_layers=3)
    with pytest.raises(CheckpointError, match=r"num_layers = 2 and the checkpoint .* has 3"):
        validate(bundle, other)


def test_a_checkpoint_that_is_gone_is_named(bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "bundle"
    shutil.copytree(bundle, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["provenance"]["checkpoint"] = str(tmp_path / "gone")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"which is not there. Name the checkpoint as the second argument"):
        validate(moved)


@pytest.mark.parametrize("path", ["~nobody-of-that-name", "x" * 5000, "a\0b"])
def test_what_cannot_be_the_path_of_a_checkpoint(bundle: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be opened: |does not exist"):
        validate(bundle, path)
    broken = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["provenance"]["checkpoint"] = path
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="which is not there"):
        validate(broken)


def test_a_full_attention_model_is_checked_up_to_its_context(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", window=None, num_layers=1)
    report = validate(export(folder, tmp_path / "bundle", chunk=6, context=20, max_batch=2))
    assert report.passed
    by_name = {check.name: check for check in report.checks}
    assert "prompt of 20" in by_name
    assert "causality" in by_name
    assert "receptive field" not in by_name
    assert by_name["ragged batch, row 1"].passed
    assert "ragged batch, row 2" not in by_name, "the bundle takes two rows"


def test_a_report_in_which_nothing_was_compared_does_not_pass() -> None:
    checks = (Check("receptive field", None, "too long"),)
    report = ValidationReport("b", "c", "onnxruntime", "float32", 0, 1.0, 1.0, 1.0, "", checks, (), {})
    assert not report.passed
    json.dumps(report.to_json(), allow_nan=False)


def shown(report: ValidationReport) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    render(report, console)
    return console.export_text()


def test_the_table_names_verdict_and_budget(report: ValidationReport) -> None:
    text = shown(report)
    assert "Parity holds" in text
    assert "prompt of 19" in text
    assert "Budget" in text
    assert "Largest error by position: 0–3: " in text
    assert "16–18: " in text  # the last of five stretches of a row of 19


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_the_command_exits_with_the_verdict(runner: CliRunner, bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    right = runner.invoke(cli, ["validate", str(bundle), "--json", "--no-receipt"])
    assert right.exit_code == 0, right.output
    assert json.loads(right.stdout)["passed"] is True
    wrong = planted(bundle, tmp_path / "wrong", change_window(-1))
    failed = runner.invoke(cli, ["validate", str(wrong), str(checkpoint)])
    assert failed.exit_code == 1
    assert "Parity fails" in failed.stdout
    impossible = runner.invoke(cli, ["validate", str(checkpoint)])
    assert impossible.exit_code == 2
