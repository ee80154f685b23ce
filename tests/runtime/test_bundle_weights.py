"""Weights that lie outside of the bundle, and hashes of all kinds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import BundleError, load, read_bundle
from tests.support.toy_bundle import ToyModel, write_manifest, write_toy_bundle


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A toy bundle whose weights lie in the folder `weights` beside it."""
    folder = write_toy_bundle(tmp_path / "bundle")
    (tmp_path / "weights").mkdir()
    (folder / "weights.bin").rename(tmp_path / "weights" / "weights.bin")
    change(folder, placement="folder", folder=str(tmp_path / "weights"))
    return folder


def change(bundle: Path, **weights: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["weights"].update(weights)
    write_manifest(bundle, manifest)


def hashes(folder: Path, sha256: str | None, blocks_sha256: str | None) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"]["files"]["weights.bin"].update(sha256=sha256, blocks_sha256=blocks_sha256)
    write_manifest(folder, manifest)


def test_a_folder_that_the_manifest_names_is_read(elsewhere: Path) -> None:
    bundle = read_bundle(elsewhere, verify=True)
    assert bundle.weights_folder == elsewhere.parent / "weights"
    assert bundle.file("weights.bin") == elsewhere.parent / "weights" / "weights.bin"
    assert bundle.file("model.onnx") == elsewhere / "model.onnx"
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    np.testing.assert_allclose(load(elsewhere, threads=1).forward(ids)[0], ToyModel().oracle(ids), atol=1e-5)


def test_a_folder_that_moved_can_be_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = (elsewhere.parent / "weights").rename(elsewhere.parent / "moved")
    with pytest.raises(BundleError, match=r"'.*/weights', which is not there\. .* --weights-folder"):
        load(elsewhere)
    assert load(elsewhere, weights_folder=moved, verify=True, threads=1).forward([1]).shape == (1, 1, 37)
    monkeypatch.chdir(elsewhere.parent)
    assert read_bundle("bundle", weights_folder="moved").weights_folder == moved
    with pytest.raises(BundleError, match="'nowhere', which is not there"):
        read_bundle(elsewhere, weights_folder="nowhere")


@pytest.mark.parametrize("folder", ["weights", "a\0b", "x" * 5000])
def test_a_folder_that_cannot_be_one(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.chdir(elsewhere.parent)  # where a relative name would be found
    change(elsewhere, folder=folder)
    with pytest.raises(BundleError, match="which is not there"):
        read_bundle(elsewhere)


def test_weights_that_are_missing_or_changed_elsewhere(elsewhere: Path) -> None:
    file = elsewhere.parent / "weights" / "weights.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"weights\.bin .* bytes in .*/weights, but its .* Restore the checkpoint"):
        read_bundle(elsewhere)
    file.unlink()
    with pytest.raises(BundleError, match=r"lacks the file weights\.bin that its manifest lists in .*/weights\. Rest"):
        read_bundle(elsewhere)


def test_a_folder_of_symbolic_links_is_refused_with_the_folder_of_the_files(elsewhere: Path) -> None:
    links = elsewhere.parent / "links"
    links.mkdir()
    (links / "weights.bin").symlink_to(elsewhere.parent / "weights" / "weights.bin")
    with pytest.raises(
        BundleError, match=r"links/weights\.bin is a link to .* real files \(.*/weights\) with --weights"
    ):
        read_bundle(elsewhere, weights_folder=links)


def test_verify_compares_every_kind_of_hash(tmp_path: Path) -> None:
    folder = write_toy_bundle(tmp_path / "bundle")
    content = (folder / "weights.bin").read_bytes()
    plain = hashlib.sha256(content).hexdigest()
    blocks = hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()
    hashes(folder, None, blocks)
    calls: list[tuple[str, int, int]] = []
    assert read_bundle(folder, verify=True, progress=lambda *call: calls.append(call)).unverified == ()
    total = len(content) + (folder / "model.onnx").stat().st_size
    assert calls[-1] == ("verifying", total, total)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    hashes(folder, None, plain)
    read_bundle(folder)
    with pytest.raises(
        BundleError, match=rf"weights\.bin .* has the block hash {blocks}, but its manifest says {plain}"
    ):
        read_bundle(folder, verify=True)
    hashes(folder, blocks, None)
    with pytest.raises(BundleError, match=rf"weights\.bin .* has the SHA-256 {plain}, but its manifest says {blocks}"):
        read_bundle(folder, verify=True)


def test_verify_says_which_file_has_no_hash(tmp_path: Path) -> None:
    folder = write_toy_bundle(tmp_path / "bundle")
    hashes(folder, None, None)
    assert read_bundle(folder).unverified == ()
    assert read_bundle(folder, verify=True).unverified == ("weights.bin",)
    assert load(folder, verify=True, threads=1).unverified == ("weights.bin",)
