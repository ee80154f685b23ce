"""A hub cache: links are followed to read and kept in every path, and what was not downloaded is said."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reference.checkpoint import describe, open_checkpoint
from reference.hub_cache import known_sha256, snapshot_of
from runtime.errors import CheckpointError
from tests.support.checkpoints import make_checkpoint
from tests.support.native import as_native

COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def cached(plain: Path, model: Path, commit: str = COMMIT) -> Path:
    """`plain` as a snapshot of the cache folder `model`: blobs named by SHA-256, or by SHA-1 for small files."""
    blobs, snapshot = model / "blobs", model / "snapshots" / commit
    blobs.mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        content = file.read_bytes()
        hashed = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / hashed(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "plain", num_layers=1, tokenizer=True)


@pytest.fixture
def model(tmp_path: Path, plain: Path) -> Path:
    model = tmp_path / "models--org--name"
    cached(plain, model)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return model


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_snapshot_is_read_through_its_links(model: Path, plain: Path) -> None:
    snapshot = model / "snapshots" / COMMIT
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.path == snapshot
    assert checkpoint.config == open_checkpoint(plain).config
    assert [file.name for file in checkpoint.tokenizer_files] == [
        file.name for file in open_checkpoint(plain).tokenizer_files
    ]
    for name, tensor in load_file(plain / "model.safetensors").items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].file == snapshot / "model.safetensors"


def test_a_linked_folder_keeps_the_name_that_the_user_gave(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "link").symlink_to(plain)
    assert open_checkpoint(tmp_path / "link").path == tmp_path / "link"


def test_a_whole_model_stands_for_the_snapshot_of_its_ref(tmp_path: Path, plain: Path, model: Path) -> None:
    other = make_checkpoint(tmp_path / "other", num_layers=2)
    cached(other, model, OLDER)
    assert open_checkpoint(model).path == model / "snapshots" / COMMIT
    assert open_checkpoint(model).config.num_layers == 1
    (model / "refs" / "main").write_text(OLDER + "\n")
    found = describe(model)
    assert found.checkpoint is not None
    assert (found.checkpoint.path, found.config.num_layers) == (model / "snapshots" / OLDER, 2)


def test_without_a_ref_the_only_snapshot_is_meant(model: Path) -> None:
    (model / "refs" / "main").unlink()
    assert open_checkpoint(model).path == model / "snapshots" / COMMIT
    (model / "snapshots" / OLDER).mkdir()
    message = refusal(model)
    assert f"has no refs/main and 2 snapshots ({COMMIT}, {OLDER})" in message
    assert message.endswith("Give the folder of one of them.")


def test_a_model_without_snapshots(tmp_path: Path) -> None:
    (tmp_path / "models--org--empty" / "snapshots").mkdir(parents=True)
    assert "no refs/main and no snapshot" in refusal(tmp_path / "models--org--empty")


@pytest.mark.parametrize("ref", [OLDER, "", "../../elsewhere", ".", "\xff", "x\0y"])
def test_a_ref_to_what_is_not_there(model: Path, ref: str) -> None:
    (model / "refs" / "main").write_bytes(ref.encode("latin-1"))
    message = refusal(model)
    assert "which is not among those that were downloaded" in message
    assert COMMIT in message


def test_a_folder_that_is_no_cache_is_itself(tmp_path: Path, plain: Path) -> None:
    (plain / "snapshots" / "one").mkdir(parents=True)
    assert snapshot_of(plain) == plain
    assert open_checkpoint(plain).path == plain


# ---------------------------------------------------------------------------------------------- partial downloads


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_to_a_blob_that_is_not_there(model: Path, name: str) -> None:
    blob = (model / "snapshots" / COMMIT / name).resolve()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    message = refusal(model)
    assert f"{name} is a link to ../../blobs/{blob.name}, which is not there" in message
    assert f"(unfinished downloads: {blob.name}.incomplete)" in message
    assert message.endswith("Finish the download of this checkpoint.")


def test_a_shard_that_is_not_there_yet(tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", num_layers=1, shards=2)
    snapshot = cached(sharded, tmp_path / "models--org--sharded")
    link = snapshot / "model-00002-of-00002.safetensors"
    blob = link.resolve()
    blob.unlink()
    assert "is a link to" in refusal(snapshot)
    link.unlink()
    (blob.parent / "abc.incomplete").write_bytes(b"")
    assert "00002-of-00002.safetensors (unfinished downloads: abc.incomplete). Download them." in refusal(snapshot)


def test_what_a_download_into_a_plain_folder_leaves(plain: Path) -> None:
    (plain / "model.safetensors").unlink()
    store = plain / ".cache" / "huggingface" / "download"
    store.mkdir(parents=True)
    (store / "x.incomplete").write_bytes(b"")
    assert "no safetensors file at all (unfinished downloads: x.incomplete)" in refusal(plain)
    (plain / "config.json").unlink()
    assert "no params.json (unfinished downloads: x.incomplete)" in refusal(plain)


def test_links_in_the_native_layout(tmp_path: Path, plain: Path) -> None:
    native = as_native(plain, tmp_path / "native")
    snapshot = cached(native, tmp_path / "models--org--native")
    assert open_checkpoint(snapshot).config == open_checkpoint(plain).config
    (snapshot / "params.json").resolve().unlink()
    assert "params.json is a link to" in refusal(snapshot)


# ---------------------------------------------------------------------------------------------- hashes


def test_the_hash_that_a_blob_is_named_by(model: Path, plain: Path, tmp_path: Path) -> None:
    snapshot = model / "snapshots" / COMMIT
    content = (plain / "model.safetensors").read_bytes()
    expected = hashlib.sha256(content).hexdigest()
    assert known_sha256(snapshot / "model.safetensors") == expected
    assert known_sha256(snapshot / "config.json") is None
    assert known_sha256(plain / "model.safetensors") is None
    assert known_sha256(model / "blobs" / expected) is None
    named = tmp_path / expected
    named.write_bytes(b"")
    (tmp_path / "link").symlink_to(named)
    assert known_sha256(tmp_path / "link") is None
