"""`cierzo validate --layers --report` and `cierzo bisect`: exit codes, JSON, tables and the HTML file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import onnx
import pytest
from click.testing import CliRunner, Result

import exporter.bisect.stages
from exporter.cli import cli
from tests.support import bundles
from tests.support.bundles import Exported, exported
from tests.support.planted import attribute, planted


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def right() -> Exported:
    return exported(num_layers=4, seed=3)


@pytest.fixture(scope="module")
def wrong(right: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def narrow(model: onnx.ModelProto) -> None:
        attribute(model, "RollingAttention", "window", 1).i -= 1

    return planted(right.bundle, tmp_path_factory.mktemp("planted") / "wrong", narrow)


@pytest.fixture(autouse=True)
def shared_traces() -> Iterator[None]:
    with mock.patch.object(exporter.bisect.stages, "trace_template", bundles.trace_once):
        yield


def test_layers_of_a_right_bundle(right: Exported, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("validate", right.bundle, "--layers", "--report", page, "--no-receipt")
    assert result.exit_code == 0, result.output
    assert "Parity holds" in result.stdout
    assert "Every module agrees: 43 compared" in result.stdout
    assert "layers.3.mlp.down_proj" in result.stdout
    assert_self_contained(page.read_text(encoding="utf-8"))
    assert "Error by depth" in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def assert_self_contained(text: str) -> None:
    """Nothing is fetched; both colour schemes are there; every plot says what its axes are."""
    assert not re.search(r"(?:src|href)=|url\(|@import|https?:|<script", text)
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == text.count("</svg>") >= 1
    assert text.count('class="label"') == 2 * text.count("<svg")
    assert text.count('role="img" aria-label="') == text.count("<svg")


def test_layers_of_a_wrong_bundle(right: Exported, wrong: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("validate", wrong, right.checkpoint, "--layers", "--json", "--report", page)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["passed"] is False
    assert found["layers"]["first_failure"] == "layers.1.self_attn.o_proj"
    assert {check["status"] for check in found["checks"]} == {"passed", "failed"}, "the ordinary checks run as well"
    text = page.read_text(encoding="utf-8")
    assert_self_contained(text)
    assert "The first module off is layers.1.self_attn.o_proj." in text
    assert '<path class="bad"' in text


def test_a_report_without_layers(right: Exported, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("validate", right.bundle, "--report", page, "--json", "--no-receipt")
    assert result.exit_code == 0
    assert "layers" not in json.loads(result.stdout)
    text = page.read_text(encoding="utf-8")
    assert_self_contained(text)
    assert "Error by position" in text
    assert "Error by depth" not in text


def test_a_report_that_cannot_be_written(right: Exported, tmp_path: Path) -> None:
    result = run("validate", right.bundle, "--report", tmp_path / "missing" / "report.html")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("validate", "--layers"), ("bisect", "--out", "nowhere")])
def test_without_polygraphy(right: Exported, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    command, *options = arguments
    result = run(command, right.bundle, *options, "--json")
    assert result.exit_code == 2
    assert 'pip install "cierzo[parity]"' in json.loads(result.stdout)["error"]["message"]


def test_bisect_exits_with_what_it_found(right: Exported, wrong: Path, tmp_path: Path) -> None:
    healthy = run("bisect", right.bundle, "--out", tmp_path / "healthy", "--json")
    assert healthy.exit_code == 0, healthy.output
    assert json.loads(healthy.stdout)["culprit"] is None
    found = run("bisect", wrong, right.checkpoint, "--out", tmp_path / "out")
    assert found.exit_code == 1
    assert "RollingAttention layers.1.node_softmax" in found.stdout
    assert "this version's does not" in found.stdout
    assert "its window is 5 where the bundle has 4" in " ".join(found.stdout.split())
    again = run("bisect", wrong, right.checkpoint, "--out", tmp_path / "out", "--json")
    assert again.exit_code == 2
    assert "exists already" in json.loads(again.stdout)["error"]["message"]
