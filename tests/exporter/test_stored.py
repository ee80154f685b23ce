"""Weights that stay where they are: the same function as converted ones, whatever the layout and wherever they lie."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import export
from exporter.bisect.search import bisect
from exporter.layer_parity import compare_layers
from exporter.validate import validate
from reference.checkpoint import SINGLE_FILE, open_checkpoint
from runtime import load
from runtime.backends import onnxruntime as backend
from runtime.errors import BundleError, ExportError
from tests.support.bundles import Exported, checkpoint, shared_traces
from tests.support.checkpoints import make_checkpoint
from tests.support.native import as_native
from tests.support.parity import Judge, random_rows
from tests.support.planted import with_weights

CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    # name: whether in Mistral's own layout, checkpoint
    "bfloat16": (False, {"dtype": "bfloat16"}),
    "float16, tied, shards": (False, {"dtype": "float16", "tie": True, "shards": 2}),
    "experts": (False, {"dtype": "bfloat16", "architecture": "mixtral"}),
    "stacked experts": (False, {"dtype": "float16", "architecture": "mixtral", "expert_layout": "stacked"}),
    "native": (True, {"dtype": "bfloat16"}),
    "native experts": (True, {"architecture": "mixtral"}),
}
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]


def made(source: Path, out: Path, **options: Any) -> Path:
    with shared_traces():
        return export(source, out, chunk=4, prove=False, **options)


def source_of(name: str, folder: Path) -> Path:
    native, settings = CASES[name]
    return as_native(checkpoint(**settings), folder / "native") if native else checkpoint(**settings)


def manifest_of(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return manifest


def logits(bundle: Path, **options: Any) -> Any:
    return load(bundle, threads=1, **options).forward(IDS)


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)


def hub_cache(source: Path, folder: Path) -> Path:
    """The checkpoint as a hub client keeps it: a snapshot of links to blobs that are named by their hash."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_converted_weights_bit_for_bit(tmp_path: Path, name: str) -> None:
    source = source_of(name, tmp_path)
    stored = made(source, tmp_path / "stored")
    weights = manifest_of(stored)["weights"]
    assert (weights["kind"], weights["placement"], weights["folder"]) == ("stored", "linked", None)
    for file in weights["files"]:
        assert (stored / file).samefile(source / file), "not one byte is copied"
    expected = logits(made(source, tmp_path / "fp32", weights="fp32"))
    assert (logits(stored, verify=True) == expected).all()
    assert (logits(made(source, tmp_path / "copied", copy=True)) == expected).all()
    assert (logits(made(source, tmp_path / "both", weights="fp32", copy=True)) == expected).all()


@pytest.mark.parametrize("options", [{"weights": "fp32"}, {"copy": True}])
def test_both_layouts_give_the_same_bytes_when_they_are_copied(tmp_path: Path, options: dict[str, Any]) -> None:
    source = checkpoint(dtype="bfloat16", architecture="mixtral")
    a = made(source, tmp_path / "a", **options)
    b = made(as_native(source, tmp_path / "native"), tmp_path / "b", **options)
    for file in ("model.onnx", "weights.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    ours, theirs = manifest_of(a), manifest_of(b)
    assert ours.pop("provenance")["layout"] == "huggingface"
    assert theirs.pop("provenance")["layout"] == "native"
    assert ours == theirs


def test_converting_what_is_float32_already_is_leaving_it(tmp_path: Path) -> None:
    source = checkpoint()
    a, b = made(source, tmp_path / "a"), made(source, tmp_path / "b", weights="fp32")
    assert (a / "model.onnx").read_bytes() == (b / "model.onnx").read_bytes()
    ours, theirs = manifest_of(a), manifest_of(b)
    assert ours["provenance"].pop("options") | {"weights": "fp32"} == theirs["provenance"].pop("options")
    assert ours == theirs
    assert ours["weights"]["folded_bytes"] == 0


def test_the_manifest_counts_what_must_be_made(tmp_path: Path) -> None:
    manifest = manifest_of(made(checkpoint(dtype="bfloat16", architecture="mixtral"), tmp_path / "bundle"))
    weights = manifest["weights"]
    assert weights["types"] == {"BF16": 41}  # 23 parameters, of which 6 are four experts each
    assert weights["folded_bytes"] == 4 * manifest["model"]["parameters"]
    experts = 6 * 4 * 32 * 48
    assert weights["folding_bytes"] == weights["folded_bytes"] + (2 + 4) * experts


def test_a_linked_bundle_outlives_its_checkpoint_and_moves(tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(dtype="bfloat16"), tmp_path / "checkpoint")
    bundle = made(source, tmp_path / "bundle")
    expected = logits(bundle)
    shutil.rmtree(source)
    moved = bundle.rename(tmp_path / "moved")
    assert (logits(moved, verify=True) == expected).all()


def test_where_links_are_refused_the_weights_stay_in_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(checkpoint(dtype="bfloat16"), tmp_path / "checkpoint")
    expected = logits(made(source, tmp_path / "linked"))
    refuse_links(monkeypatch)
    bundle = made(source, tmp_path / "bundle")
    weights = manifest_of(bundle)["weights"]
    assert (weights["placement"], weights["folder"]) == ("folder", str(source))
    assert sorted(file.name for file in bundle.iterdir()) == ["manifest.json", "model.onnx"]
    assert (logits(bundle, verify=True) == expected).all()
    assert validate(bundle).passed
    assert compare_layers(bundle).passed
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match=r"which is not there\. If it was moved, name it with --weights-folder"):
        load(bundle)
    assert (logits(bundle, weights_folder=moved) == expected).all()
    assert validate(bundle, moved, weights_folder=moved).passed
    assert bisect(bundle, moved, tmp_path / "culprit", weights_folder=moved).healthy


@pytest.mark.parametrize("linked", [True, False])
def test_a_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    source = checkpoint(dtype="bfloat16", shards=2)
    snapshot = hub_cache(source, tmp_path / "models--a--b")
    if not linked:
        refuse_links(monkeypatch)
    bundle = made(snapshot, tmp_path / "bundle")
    weights = manifest_of(bundle)["weights"]
    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    hashes = {shard: hashlib.sha256((source / shard).read_bytes()).hexdigest() for shard in shards}
    if linked:
        assert set(weights["files"]) == shards
        assert all(not (bundle / shard).is_symlink() for shard in shards)
    else:
        assert set(weights["files"]) == set(hashes.values()), "the names of the real files"
        assert weights["folder"] == str(tmp_path / "models--a--b" / "blobs")
    assert {entry["sha256"] for entry in weights["files"].values()} == set(hashes.values()), "known without reading"
    files = manifest_of(bundle)["provenance"]["files"]
    assert {shard: files[shard]["sha256"] for shard in shards} == hashes
    assert files["model.safetensors.index.json"]["sha256"] is not None
    expected = logits(made(source, tmp_path / "fp32", weights="fp32"))
    assert (logits(bundle, verify=True) == expected).all()


def test_without_hashes_nothing_is_read_and_verify_says_so(tmp_path: Path) -> None:
    stages: set[str] = set()
    bundle = made(
        checkpoint(), tmp_path / "bundle", hashes=False, progress=lambda stage, done, total: stages.add(stage)
    )
    assert stages == {"tracing", "fusing"}
    assert manifest_of(bundle)["weights"]["files"][SINGLE_FILE] | {"bytes": 0} == {
        "bytes": 0,
        "sha256": None,
        "blocks_sha256": None,
    }
    assert load(bundle, verify=True, threads=1).unverified == (SINGLE_FILE,)
    assert validate(bundle, verify=True).unverified == (SINGLE_FILE,)


def test_a_checkpoint_that_changed_after_the_export_is_found(tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(dtype="bfloat16"), tmp_path / "checkpoint")
    bundle = made(source, tmp_path / "bundle")
    content = bytearray((source / SINGLE_FILE).read_bytes())
    content[-1] ^= 1
    (source / SINGLE_FILE).write_bytes(content)  # in place: the link is the same file
    load(bundle, threads=1)
    with pytest.raises(BundleError, match=r"model\.safetensors .* has the block hash"):
        load(bundle, verify=True)
    (source / SINGLE_FILE).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"model\.safetensors .* bytes, but its manifest says"):
        load(bundle)


def test_float64_can_only_be_converted(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", num_layers=1)
    tensors = load_file(source / SINGLE_FILE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float64)
    save_file(tensors, source / SINGLE_FILE, metadata={"format": "pt"})
    for copy in (False, True):
        with pytest.raises(ExportError, match=r"model\.norm\.weight \(F64\)\)\. Pass --weights fp32"):
            made(source, tmp_path / "bundle", copy=copy)
    assert logits(made(source, tmp_path / "bundle", weights="fp32")).shape == (1, len(IDS), 64)


def test_only_a_copy_needs_room_for_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    made(checkpoint(), tmp_path / "linked")
    for options in ({"copy": True}, {"weights": "fp32", "copy": True}):
        with pytest.raises(ExportError, match=r"needs 0\.07 GB and the disk of .* has 0\.07 GB left"):
            made(checkpoint(), tmp_path / "copied", **options)


@pytest.mark.parametrize("name", ["bfloat16", "experts"])
def test_an_engine_without_room_for_made_weights_holds_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = source_of(name, tmp_path)
    bundle = made(source, tmp_path / "bundle", max_batch=2)
    monkeypatch.setattr(backend, "available_memory", lambda: 0)
    monkeypatch.setattr(backend, "_SMALL", "1")  # the matrices of this model are small
    session = load(bundle, threads=1)
    assert not backend.folds_weights(session.manifest.weights, 0)
    assert "every step makes them anew" in session.notes[0]
    judge = Judge(Exported(source, bundle))
    judge.hold(session, random_rows([23, 11], judge.vocab_size, seed=3), seed=4)


def test_a_folder_with_both_layouts_is_reopened_as_it_was_exported(tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(dtype="bfloat16"), tmp_path / "both")
    as_native(checkpoint(dtype="bfloat16", seed=1), source)
    bundle = made(source, tmp_path / "bundle", layout="native")
    assert manifest_of(bundle)["provenance"]["layout"] == "native"
    assert set(manifest_of(bundle)["provenance"]["files"]) == {"params.json", "consolidated.safetensors"}
    assert validate(bundle).passed
    assert bisect(bundle, None, tmp_path / "culprit").healthy
    assert open_checkpoint(source).layout == "huggingface"


@pytest.mark.parametrize("name", ["bfloat16", "native experts"])
def test_a_wrong_weight_is_found_behind_its_recipe(tmp_path: Path, name: str) -> None:
    source = source_of(name, tmp_path)
    bundle = made(source, tmp_path / "bundle")
    assert compare_layers(bundle).passed
    assert bisect(bundle, None, tmp_path / "healthy").healthy
    parameter = "layers.1.self_attn.q_proj.weight"
    wrong = with_weights(bundle, tmp_path / "wrong", parameter, [5], by=2.0)
    report = bisect(wrong, source, tmp_path / "culprit")
    assert report.culprit is not None
    assert (report.culprit.kind, report.culprit.weight) == ("weight", parameter)
    assert report.culprit.module == "layers.1.self_attn.q_proj"
    assert report.nodes_written == 1
    assert report.confirmed
    assert [difference.elements for difference in report.weights] == [1]
    assert not np.isnan(report.weights[0].largest)
