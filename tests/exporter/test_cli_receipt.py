"""Receipts on the command line: `validate` keeps them, `generate` and `bench` ask for one, `inspect` shows them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exporter.cli import cli
from exporter.inspect import inspect_path
from exporter.validation_report import ValidationReport
from runtime.parity_file import as_file
from tests.support.bundles import Exported, exported
from tests.support.inspecting import drawn
from tests.support.receipts import build_engine, failing, key_pair, passing, receipts_of, toy, validated


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made() -> Exported:
    return exported(num_layers=1, window=5)


@pytest.fixture
def bundle(made: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.bundle, tmp_path / "bundle", copy_function=shutil.copy))


def words(text: str) -> str:
    return " ".join(text.split())


def test_from_export_to_a_proven_generation(bundle: Path, tmp_path: Path) -> None:
    content = (bundle / "manifest.json").read_bytes()
    assert as_file(json.loads(content)) == content, "an export writes what a proof asks for"
    arguments = ("generate", bundle, "1 2 3", "--ids", "--max-new-tokens", "2", "--threads", "1")
    refused = run(*arguments, "--require-parity", "--json")
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"]["type"] == "UnprovenError"
    assert "has no receipt of parity" in refused.stderr

    private, public = key_pair(tmp_path, "ours")
    done = run("validate", bundle, "--suite", "quick", "--sign", private)
    assert done.exit_code == 0, done.output
    assert f"wrote {bundle}/parity.json: a receipt for the backend onnxruntime, suite quick, signed by " in done.stdout
    (receipt,) = receipts_of(bundle)
    assert receipt["figures"]["checks_run"] >= 5
    assert 0 < receipt["figures"]["largest_error"] <= receipt["figures"]["budget"]

    assert run(*arguments, "--require-parity").stdout == run(*arguments).stdout
    assert run(*arguments, "--require-parity", "--trust", public).exit_code == 0
    full = run(*arguments, "--require-full-parity")
    assert full.exit_code == 2
    assert "is of another suite than full" in full.stderr
    _, other = key_pair(tmp_path, "theirs")
    assert "is signed by another key" in run(*arguments, "--require-parity", "--trust", other).stderr

    with (bundle / "model.onnx").open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    tampered = run(*arguments, "--require-parity")
    assert tampered.exit_code == 2
    assert "model.onnx" in tampered.stderr


def test_bench_asks_for_a_proof(bundle: Path) -> None:
    arguments = ("bench", bundle, "--contexts", "8", "--rounds", "1", "--decode-tokens", "2", "--prompt", "4")
    refused = run(*arguments, "--threads", "1", "--require-parity")
    assert refused.exit_code == 2
    assert "has no receipt of parity" in refused.stderr
    validated(bundle)
    assert run(*arguments, "--threads", "1", "--require-parity", "--json").exit_code == 0
    for name in ("first", "second"):
        build_engine(bundle, name)
        validated(bundle, backend="tensorrt", engine=name)
    several = run(*arguments, "--backend", "tensorrt", "--require-parity")
    assert several.exit_code == 2
    assert "are proved: first, second. Name the one to measure with --engine" in several.stderr


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_trusted_key_goes_with_a_required_proof(bundle: Path, tmp_path: Path, command: str) -> None:
    result = run(command, bundle, "--trust", tmp_path / "key.pem")
    assert result.exit_code == 2
    assert "needs --require-parity beside it" in result.stderr


class Validated:
    """Stands for the validation itself: what it reports is what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.report: ValidationReport | None = None
        monkeypatch.setattr("exporter.validate.validate", self.validate)

    def validate(self, *_arguments: object, **_options: object) -> ValidationReport | None:
        return self.report


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> Validated:
    return Validated(monkeypatch)


def test_in_json_the_receipt_is_named(validation: Validated, tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    validation.report = passing(bundle)
    found: dict[str, Any] = json.loads(run("validate", bundle, "--json").stdout)
    (receipt,) = receipts_of(bundle)
    assert found["receipt"] == {
        "file": str(bundle / "parity.json"),
        "suite": "full",
        "made": receipt["made"],
        "digest": receipt["digest"],
        "signed_by": None,
    }
    validation.report = failing(bundle)
    failed = run("validate", bundle, "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["receipt"] is None
    assert not (bundle / "parity.json").exists()


def test_a_failing_run_says_what_it_removed(validation: Validated, tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    validated(bundle)
    validation.report = failing(bundle)
    result = run("validate", bundle)
    assert result.exit_code == 1
    assert "removed the receipt for the backend onnxruntime from " in result.stdout
    assert "wrote no receipt for the backend onnxruntime, since parity fails" in run("validate", bundle).stdout


def test_no_receipt(validation: Validated, tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    validation.report = passing(bundle)
    result = run("validate", bundle, "--no-receipt", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["receipt"] is None
    assert not (bundle / "parity.json").exists()
    validated(bundle)
    before = (bundle / "parity.json").read_bytes()
    validation.report = failing(bundle)
    assert run("validate", bundle, "--no-receipt").exit_code == 1
    assert (bundle / "parity.json").read_bytes() == before
    both = run("validate", bundle, "--no-receipt", "--sign", tmp_path / "key.pem")
    assert both.exit_code == 2
    assert "give one of them" in both.stderr


def test_the_report_is_shown_before_a_receipt_is_refused(validation: Validated, tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    validation.report = passing(bundle, backend="tensorrt", engine="gone")
    result = run("validate", bundle)
    assert result.exit_code == 2
    assert "Parity holds" in result.stdout
    assert "The engine gone was removed from the bundle" in result.stderr


def test_a_run_that_is_only_worse_than_its_baseline_changes_no_receipt(validation: Validated, tmp_path: Path) -> None:
    bundle, stored = toy(tmp_path / "bundle"), tmp_path / "baseline.json"
    validation.report = passing(bundle)
    assert run("validate", bundle, "--save-baseline", stored).exit_code == 0
    before = (bundle / "parity.json").read_bytes()
    worse = [check if check.error is None else replace(check, error=3e-5) for check in passing(bundle).checks]
    validation.report = passing(bundle, checks=tuple(worse))
    result = run("validate", bundle, "--baseline", stored, "--seed", "3", "--json")
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["receipt"] is None
    assert (bundle / "parity.json").read_bytes() == before


def test_inspect_shows_them(tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    report = inspect_path(bundle).bundle
    assert report is not None
    assert report.receipts == ()
    private, _ = key_pair(tmp_path, "ours")
    build_engine(bundle, "first")
    validated(bundle, sign=private)
    validated(bundle, backend="tensorrt", engine="first", suite="quick")
    signed, engine = shown(bundle)
    assert signed["problem"] is engine["problem"] is None
    assert (signed["backend"], signed["engine"], signed["suite"]) == ("onnxruntime", None, "full")
    assert signed["signed_by"] == receipts_of(bundle)[0]["signature"]["key"]
    assert (engine["engine"], engine["signed_by"]) == ("first", None)
    text = words(drawn(inspect_path(bundle)))
    assert "Receipts of parity" in text
    assert "graph and manifest do" in text


def shown(bundle: Path) -> list[dict[str, Any]]:
    found = inspect_path(bundle).to_json()["bundle"]["receipts"]
    assert isinstance(found, list)
    return found


def test_inspect_says_what_no_longer_fits(tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    folder = build_engine(bundle, "first")
    validated(bundle)
    validated(bundle, backend="tensorrt", engine="first")
    (folder / "prefill.plan").write_bytes(b"longer than before")
    assert [receipt["problem"] for receipt in shown(bundle)] == [None, "the size of prefill.plan differs"]
    build_engine(bundle, "first", content=b"again")
    assert "engine.json differs, as after another build" in shown(bundle)[1]["problem"]
    graph = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(graph[:-1] + bytes([graph[-1] ^ 1]))
    assert {receipt["problem"] for receipt in shown(bundle)} == {"the hash of model.onnx differs"}
    assert "no: the hash of model.onnx differs" in words(drawn(inspect_path(bundle)))
    (bundle / "model.onnx").write_bytes(graph)
    manifest = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_bytes(manifest + b"\n")
    assert "not as Cierzo writes it" in shown(bundle)[0]["problem"]
    (bundle / "manifest.json").write_bytes(manifest)
    (bundle / "parity.json").write_bytes(b"{}")
    (damaged,) = shown(bundle)
    assert damaged["backend"] is None
    assert "schema_version` must be an integer, but it is missing" in damaged["problem"]
