"""Weights that lie outside of the bundle, and hashes of all kinds."""

from __future__ import annotations

import hashlib
import json
import os
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
    for wrong in ("nowhere", "~nobody-of-that-name/weights"):
        with pytest.raises(BundleError, match=f"'{wrong}', which is not there"):
            read_bundle(elsewhere, weights_folder=wrong)


@pytest.mark.parametrize("folder", ["weights", "a\0b", "x" * 5000, "~", "~nobody-of-that-name"])
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


def test_a_bundle_whose_weights_a_cache_made_a_link_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """ONNX Runtime would refuse it as well, with a text that speaks of an escape."""
    folder = write_toy_bundle(tmp_path / "bundle")
    (folder / "weights.bin").rename(tmp_path / "0123abc")
    (folder / "weights.bin").symlink_to(tmp_path / "0123abc")
    with pytest.raises(BundleError, match=r"is a link to .*/0123abc, .* a hard link to it, there as weights\.bin\."):
        read_bundle(folder)
    (folder / "weights.bin").unlink()
    (tmp_path / "0123abc").rename(folder / "weights.bin")
    (tmp_path / "link").symlink_to(folder)
    read_bundle(tmp_path / "link")


def test_a_link_to_a_file_that_only_its_owner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_toy_bundle(tmp_path / "bundle")
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "weights.bin")  # root has every right
    with pytest.raises(BundleError, match=r"weights\.bin cannot be read: this user has no right to"):
        read_bundle(folder)


def test_a_file_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    """It would be taken from the folder of the weights, whichever was meant."""
    folder = write_toy_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"]["files"]["model.onnx"] = manifest["files"]["model.onnx"]
    write_manifest(folder, manifest)
    with pytest.raises(BundleError, match=r"lists 'model\.onnx' under `files` and under `weights\.files`"):
        read_bundle(folder)


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
