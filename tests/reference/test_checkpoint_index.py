"""Sharded checkpoints: an index that lies in any way is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from reference.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from runtime.errors import CheckpointError
from tests.support.checkpoints import make_checkpoint


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", num_layers=1, tokenizer=True)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", num_layers=1, shards=3)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "lacks 1 of the 3 shards that its index names: model-00002-of-00003.safetensors" in refusal(sharded)


def test_a_tensor_that_its_shard_does_not_hold(sharded: Path) -> None:
    edit_index(sharded, lambda weights: weights.update({"model.more": "model-00001-of-00003.safetensors"}))
    assert "does not hold 1 tensors that model.safetensors.index.json places there: model.more" in refusal(sharded)


def test_a_tensor_that_the_index_omits(sharded: Path) -> None:
    edit_index(sharded, lambda weights: weights.pop("model.norm.weight"))
    assert "holds 1 tensors that model.safetensors.index.json does not place there" in refusal(sharded)


def test_a_tensor_that_two_shards_hold(sharded: Path) -> None:
    shard = sharded / "model-00001-of-00003.safetensors"
    elsewhere = load_file(sharded / "model-00002-of-00003.safetensors")
    name = next(iter(elsewhere))
    save_file(load_file(shard) | {name: elsewhere[name]}, shard)
    assert f"does not place there: {name}" in refusal(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "sub/model.safetensors", "..", "", "a\0b", "n" * 300])
def test_a_shard_outside_the_folder(sharded: Path, shard: str) -> None:
    edit_index(sharded, lambda weights: weights.update({"model.norm.weight": shard}))
    assert "no file name inside the folder" in refusal(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_without_a_map(sharded: Path, text: str) -> None:
    (sharded / INDEX_FILE).write_text(text)
    assert "has no weight_map" in refusal(sharded)


def test_a_single_file_beside_an_index_of_other_files(sharded: Path) -> None:
    (sharded / SINGLE_FILE).write_bytes(b"")
    assert f"has both {SINGLE_FILE} and" in refusal(sharded)


def test_an_index_of_the_single_file(folder: Path) -> None:
    names = list(open_checkpoint(folder).tensors)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE_FILE)}))
    assert list(open_checkpoint(folder).tensors) == names
