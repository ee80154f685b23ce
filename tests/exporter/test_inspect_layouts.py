"""`inspect` on everything that is no plain Hugging Face folder: native files, hub caches, models that read images."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from exporter.inspect import InspectReport, inspect_path, render
from runtime.errors import CheckpointError, ConfigError
from tests.support.checkpoints import make_checkpoint
from tests.support.native import as_native

CONFIGS = Path(__file__).parents[1] / "support" / "configs"
PARAMS = CONFIGS.with_name("params")


def drawn(report: InspectReport) -> str:
    stream = io.StringIO()
    render(report, Console(file=stream, width=80))
    return stream.getvalue()


def test_both_layouts_of_a_model_give_one_report(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", architecture="mixtral", num_layers=1, dtype="bfloat16")
    native = as_native(plain, tmp_path / "native", shards=2)
    ours, theirs = inspect_path(native), inspect_path(plain)
    assert (ours.kind, ours.model.layout, theirs.model.layout) == ("checkpoint", "native", "huggingface")
    assert replace(ours.model, layout="huggingface") == theirs.model
    assert (ours.parameters, ours.kv, ours.receptive_field) == (theirs.parameters, theirs.kv, theirs.receptive_field)
    assert ours.stored is not None
    assert theirs.stored is not None
    assert (ours.stored.files, ours.stored.bytes) == (2, theirs.stored.bytes)
    assert "Mistral's own" in drawn(ours)
    assert inspect_path(native / "params.json").parameters == ours.parameters
    both = as_native(plain, plain)
    assert inspect_path(both).model.layout == "huggingface"
    assert inspect_path(both, layout="native").model.layout == "native"


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.json")), ids=lambda path: path.stem)
def test_a_bare_params_file(path: Path) -> None:
    report = inspect_path(path, text_only=True)
    assert (report.kind, report.model.layout) == ("config", "native")
    assert f"{report.parameters.total:,}" in drawn(report)


@pytest.mark.parametrize(
    "name, total",
    [("Pixtral-12B", "12.2"), ("Mistral-Small-3.1-24B", "23.6"), ("Ministral-3-8B", "8.5"), ("Ministral-3-3B", "3.4")],
)
def test_the_language_model_of_one_that_reads_images(name: str, total: str) -> None:
    for folder in (CONFIGS, PARAMS):
        with pytest.raises(ConfigError, match="--text-only"):
            inspect_path(folder / f"{name}.json")
        parameters = inspect_path(folder / f"{name}.json", text_only=True).parameters
        assert f"{parameters.total / 1e9:.1f}" == total


def test_tensors_that_read_images_are_listed_as_unused(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", num_layers=1)
    native = as_native(plain, tmp_path / "native", vision_encoder={"hidden_size": 8})
    file = native / "consolidated.safetensors"
    save_file(load_file(file) | {"vision_encoder.ln_pre.weight": torch.ones(8)}, file)
    with pytest.raises(ConfigError, match="vision_encoder"):
        inspect_path(native)
    report = inspect_path(native, text_only=True)
    assert report.stored is not None
    assert list(report.stored.unused) == ["vision_encoder.ln_pre.weight"]
    assert "it reads images" in drawn(report)


def test_a_hub_cache(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", num_layers=1)
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        (snapshot / file.name).symlink_to(file)
    report = inspect_path(tmp_path / "models--org--name")
    assert (report.kind, report.path) == ("checkpoint", str(snapshot))
    (plain / "config.json").unlink()
    for path in (snapshot, snapshot / "config.json"):
        with pytest.raises(CheckpointError, match="is a link to"):
            inspect_path(path)


def test_a_damaged_checkpoint_is_refused_and_one_without_weights_is_its_config(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        inspect_path(folder)
    file.unlink()
    assert inspect_path(folder).kind == "config"
