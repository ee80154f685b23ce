"""`cierzo build`: options, the table and the JSON object, errors, and what `cierzo inspect` shows afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from exporter.build.plan_tables import draw
from exporter.cli import cli
from exporter.inspect import inspect_path
from runtime.bundle import read_bundle
from runtime.engine_info import DECODE, PREFILL
from tests.support.engines import CHUNK, bundle_of, engine, kernels_compiled
from tests.support.inspecting import drawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("window", tmp_path_factory.mktemp("cli") / "bundle").path


def build(*arguments: str | Path) -> Result:
    with kernels_compiled():
        return CliRunner().invoke(cli, ["build", *map(str, arguments)])


def test_a_table_shows_what_a_step_runs_and_a_line_what_was_written(folder: Path) -> None:
    result = build(folder, "--compute-capability", "8.9", "--plugins", "all")
    assert result.exit_code == 0, result.output
    (name,) = read_bundle(folder).manifest.engines
    rows = [line.split() for line in result.stdout.splitlines()]
    header = next(row for row in rows if row[:1] == ["plan"])
    assert header[1:6] == ["rows", "tokens", "MB", "seconds", "products"]
    assert header[6:] == ["attention", "plugins", "copies", "others"]
    prefill, decode, several = (rows[rows.index(header) + offset] for offset in (2, 3, 4))
    assert prefill[:3] == [PREFILL, "1-2", f"1-{CHUNK}"]
    assert prefill[5:] == ["9", "0", "2", "1", "8"]
    assert decode[:3] == [DECODE, "1", "1"]
    assert several == ["1-2", "1", *prefill[5:]]
    assert f"wrote {folder}/engines/{name} (" in result.stdout.replace("\n", "")
    assert "filled from model.safetensors when it is loaded" in result.stdout.replace("\n", "")
    assert "compute capability 8.9, bfloat16" in result.stdout


def test_the_table_of_a_large_model_fits_a_terminal() -> None:
    built = engine("window").built
    plans = {name: replace(plan, bytes=28_000_000_000) for name, plan in built.info.plans.items()}
    counts = {"product": 1234, "attention": 1, "plugin": 123, "copy": 123, "other": 1234}
    large = replace(
        built,
        info=replace(built.info, plans=plans),
        seconds=dict.fromkeys(plans, 1234.5),
        kernels={name: [counts] * len(plan.profiles) for name, plan in plans.items()},
    )
    with (console := Console(width=80)).capture() as shown:
        console.print(draw(large))
    rows = [line.split() for line in shown.get().splitlines()]
    assert [PREFILL, "1-2", f"1-{CHUNK}", "28,000.0", "1234.5", "1234", "1", "123", "123", "1234"] in rows


def test_options_reach_the_engine_and_json_says_all(folder: Path) -> None:
    options = ("--flavor", "tensorrt-rtx", "--arithmetic", "float16", "--kv", "bfloat16", "--plugins", "none")
    result = build(folder, "--compute-capability", "8.6", *options, "--weights", "embedded", "--json")
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    assert told["flavor"] == "tensorrt-rtx"
    assert (told["compute_capability"], told["arithmetic"], told["kv"]) == ("8.6", "float16", "bfloat16")
    assert (told["plugins"], told["weights"]) == ([], "embedded")
    assert told["compiled_kernels"] > 0  # those that choose among logits; no plugin has any
    assert told["folder"] == str(folder / "engines" / told["engine"])
    assert set(told["plans"]) == {PREFILL, DECODE}
    for name, plan in told["plans"].items():
        assert plan["bytes"] == (Path(told["folder"]) / f"{name}.plan").stat().st_size
        assert len(plan["kernels"]) == (1 if name == PREFILL else 2)
        assert all(counts["plugin"] == 0 and counts["attention"] == 2 for counts in plan["kernels"])
    assert 0 < told["peak_bytes"] < 1.5e9


def test_inspect_lists_engines_and_names_what_is_wrong_with_one(folder: Path) -> None:
    assert build(folder, "--compute-capability", "12.0", "--json").exit_code == 0
    facts = inspect_path(folder).bundle
    assert facts is not None
    engine = next(engine for engine in facts.engines if engine.compute_capability == "12.0")
    assert (engine.flavor, engine.arithmetic, engine.weights) == ("tensorrt-rtx", "bfloat16", "weightless")
    assert engine.plugins == ("PackedRollingAttention",)
    assert engine.bytes == sum(path.stat().st_size for path in (folder / "engines" / engine.name).glob("*.plan"))
    assert {path.name for path in folder.iterdir() if path.is_file()} - {"manifest.json"} == set(facts.files)
    assert engine.name in drawn(inspect_path(folder))
    (folder / "engines" / engine.name / "engine.json").write_text("{}")
    damaged = next(
        found for found in inspect_path(folder).to_json()["bundle"]["engines"] if found["name"] == engine.name
    )
    assert "build it again" in damaged["problem"]
    assert "build it again" in " ".join(drawn(inspect_path(folder)).split())


def test_an_error_is_one_paragraph_and_an_object(folder: Path) -> None:
    result = build(folder, "--compute-capability", "9.0", "--flavor", "tensorrt-rtx", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "BackendError"
    assert "does not build for compute capability 9.0" in result.stderr
    assert build(folder, "--flavor", "other").exit_code == 2
    assert build(folder.parent, "--compute-capability", "8.9").exit_code == 2
