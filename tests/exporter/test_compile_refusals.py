"""What an export refuses: at once, before anything is traced, with a text that names the cause, and without a trace
of itself in the folder that the bundle was to stand in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import exporter.compile
from exporter import export
from reference.checkpoint import SINGLE_FILE
from runtime.errors import CheckpointError, CierzoError, ConfigError, ExportError
from tests.support.bundles import checkpoint, shared_traces

Edit = Callable[[Path], None]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a sound checkpoint, for the test to spoil."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "checkpoint"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the bundle is to be written: alone in its folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


def refusal(source: Path, target: Path, error: type[CierzoError], **options: Any) -> str:
    """The text of a refusal that comes before tracing and leaves the target's folder as it was."""

    def trace(*plan_and_frontend: object) -> None:
        raise AssertionError("the export went on to trace")

    parent = target.parent
    before = sorted(parent.iterdir()) if parent.is_dir() else []
    with mock.patch.object(exporter.compile, "trace", trace), pytest.raises(error) as caught:
        export(source, target, **options)
    assert (sorted(parent.iterdir()) if parent.is_dir() else []) == before
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def edited(source: Path, **changes: object) -> Path:
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return source


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "unknown RoPE type": (
        {"rope_parameters": {"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}},
        'config.json says rope_parameters.rope_type = "proportional", but Cierzo computes RoPE of the types',
    ),
    "unknown activation": ({"hidden_act": "mish"}, 'config.json says hidden_act = "mish", but Cierzo computes'),
    "unknown key": ({"attention_sinks": 4}, "config.json says attention_sinks = 4, but Cierzo does not know"),
    "key that changes the maths": ({"attention_bias": True}, "config.json says attention_bias = true, but"),
    "quantised": ({"quantization_config": {"bits": 4}}, "config.json says quantization_config ="),
    "other architecture": ({"model_type": "gemma"}, 'config.json says model_type = "gemma"'),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(source: Path, target: Path, name: str) -> None:
    changes, words = CONFIGS[name]
    assert words in refusal(edited(source, **changes), target, ConfigError)


def test_an_unknown_key_may_be_ignored_on_request(source: Path, target: Path) -> None:
    with shared_traces():
        export(edited(source, attention_sinks=4), target, chunk=4, ignore_config_keys=["attention_sinks"])
    assert target.is_dir()


def tensors_changed(changes: dict[str, torch.Tensor | None]) -> Edit:
    def edit(folder: Path) -> None:
        tensors: dict[str, torch.Tensor | None] = {**load_file(folder / SINGLE_FILE), **changes}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / SINGLE_FILE, metadata={"format": "pt"})

    return edit


def truncated(folder: Path) -> None:
    content = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(content[:-1])


def without(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


WEIGHTS: dict[str, tuple[Edit, str]] = {
    "missing tensor": (tensors_changed({"model.norm.weight": None}), "lacks 1 tensor (model.norm.weight)"),
    "surplus tensor": (
        tensors_changed({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        "holds 1 tensor (model.layers.0.self_attn.q_norm.weight)",
    ),
    "wrong shape": (
        tensors_changed({"model.norm.weight": torch.ones(31)}),
        "model.norm.weight is [31] instead of [32]",
    ),
    "integers": (tensors_changed({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "(I8)"),
    "truncated file": (truncated, "model.safetensors"),
    "no weights": (without(SINGLE_FILE), "but neither model.safetensors nor"),
    "no config": (without("config.json"), "has no config.json"),
    "no folder": (lambda folder: shutil.rmtree(folder), "does not exist"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(source: Path, target: Path, name: str) -> None:
    edit, words = WEIGHTS[name]
    edit(source)
    assert words in refusal(source, target, CheckpointError)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": "int3"}, "weights = 'int3' is not one that this version writes (stored, fp32, int8, int4)"),
    "no chunk": ({"chunk": 0}, "chunk is 0, but must be a whole number of at least 1"),
    "no rows": ({"max_batch": 0}, "max_batch is 0, but must be"),
    "no context": ({"context": 0}, "context is 0, but must be"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(source: Path, target: Path, name: str) -> None:
    options, words = OPTIONS[name]
    assert words in refusal(source, target, ExportError, **options)


def test_a_window_too_wide_to_be_recognised(target: Path) -> None:
    text = refusal(checkpoint(window=2**20 + 1), target, ExportError)
    assert "a sliding window of 1,048,577 tokens, and masks are recognised up to 1,048,576" in text


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_target_that_exists(source: Path, target: Path, kind: str) -> None:
    if kind == "folder":
        target.mkdir()
        (target / "precious").write_text("kept")
    else:
        target.write_text("kept")
    assert f"{target} exists already" in refusal(source, target, ExportError)
    assert ((target / "precious") if kind == "folder" else target).read_text() == "kept"


def test_a_parent_folder_that_is_not_there(source: Path, target: Path) -> None:
    text = refusal(source, target.parent / "deep" / "bundle", ExportError)
    assert f"{target.parent / 'deep'} is not a folder" in text


def test_a_checkpoint_that_no_bundle_can_name(source: Path, target: Path) -> None:
    odd = source.rename(source.with_name(os.fsdecode(b"odd\xff")))
    assert "is not UTF-8 text" in refusal(odd, target, ExportError)
    (source.parent / "link").symlink_to(odd)
    assert "is not UTF-8 text" in refusal(source.parent / "link", target, ExportError)


def test_a_full_disk(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    text = refusal(source, target, ExportError)
    assert "GB left" in text
    assert "nothing was written" in text


@pytest.mark.parametrize("inside", [".", "passes"])
def test_passes_dumped_into_the_bundle_itself(source: Path, target: Path, inside: str) -> None:
    text = refusal(source, target, ExportError, dump_passes=target / inside)
    assert f"cannot be dumped into the bundle {target} itself" in text


def test_a_folder_for_the_passes_that_is_a_file(source: Path, target: Path) -> None:
    text = refusal(source, target, ExportError, dump_passes=source / "config.json")
    assert f"The folder {source / 'config.json'} for the dumped passes cannot be made" in text
