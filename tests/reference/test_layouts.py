"""Which of a folder's files are read: one layout at a time, whole, and with a sentence when it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from reference.checkpoint import HUGGING_FACE, NATIVE, describe, open_checkpoint, read_config
from runtime.errors import CheckpointError, ConfigError
from tests.support.checkpoints import make_checkpoint
from tests.support.native import as_native

HF_FILE, NATIVE_FILE = "model.safetensors", "consolidated.safetensors"


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A folder as most are published: one model in both layouts."""
    folder = make_checkpoint(tmp_path / "both", num_layers=1, window=5)
    return as_native(folder, folder)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return as_native(make_checkpoint(tmp_path / "hf", num_layers=1), tmp_path / "native")


# ---------------------------------------------------------------------------------------------- the choice


def test_a_folder_with_both_is_read_as_hugging_face_unless_asked(both: Path) -> None:
    for asked, layout, file in (
        (None, HUGGING_FACE, HF_FILE),
        (HUGGING_FACE,) * 2 + (HF_FILE,),
        (NATIVE,) * 2 + (NATIVE_FILE,),
    ):
        checkpoint = open_checkpoint(both, layout=asked)
        assert checkpoint.layout == layout
        assert {entry.file.name for entry in checkpoint.tensors.values()} == {file}
        assert checkpoint.tensors.keys() == load_file(both / file).keys()
        assert checkpoint.path == both


@pytest.mark.parametrize("gone", [("config.json",), (HF_FILE,), ("config.json", HF_FILE)])
def test_the_layout_that_is_whole_is_read(both: Path, gone: tuple[str, ...]) -> None:
    for name in gone:
        (both / name).unlink()
    assert open_checkpoint(both).layout == NATIVE
    assert open_checkpoint(both, layout=NATIVE).layout == NATIVE


def test_a_layout_that_is_asked_for_and_not_there(tmp_path: Path, native: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", num_layers=1)
    message = refusal(plain, layout=NATIVE)
    assert "has no params.json, which the layout native begins with" in message
    assert "It is there in the layout huggingface: ask for that, or download params.json and consolidated*" in message
    assert "has no config.json, which the layout huggingface begins with" in refusal(native, layout=HUGGING_FACE)
    assert "Download config.json and model*.safetensors" in refusal(native.parent, layout=HUGGING_FACE)
    assert "layout = 'gguf' is not one that Cierzo reads (huggingface, native)" in refusal(plain, layout="gguf")


def test_the_tensors_of_one_with_the_config_of_the_other(both: Path) -> None:
    (both / "params.json").rename(both.parent / "params.json")
    (both / HF_FILE).unlink()
    message = refusal(both)
    assert "has config.json, but neither model.safetensors nor model.safetensors.index.json" in message
    assert "Download params.json, or download model*.safetensors" in message
    (both.parent / "params.json").rename(both / "params.json")
    assert "Ask for the layout native, or download model*.safetensors" in refusal(both, layout=HUGGING_FACE)
    (both / "params.json").rename(both.parent / "params.json")
    (both / NATIVE_FILE).rename(both / HF_FILE)
    (both / "config.json").unlink()
    (both.parent / "params.json").rename(both / "params.json")
    for layout in (None, NATIVE):
        message = refusal(both, layout=layout)
        assert "has params.json, but neither consolidated.safetensors nor" in message
        assert "Download config.json, or download consolidated*.safetensors" in message


def test_an_adapter_is_neither_a_model_nor_left_out(both: Path) -> None:
    """transformers, with peft, adds an adapter that lies beside a whole model without being asked."""
    (both / "adapter_config.json").write_text("{}")
    assert "has an adapter_config.json beside its config.json" in refusal(both)
    assert open_checkpoint(both, layout=NATIVE).layout == NATIVE
    (both / "config.json").unlink()
    assert open_checkpoint(both).layout == NATIVE
    (both / "params.json").unlink()
    message = refusal(both)
    assert "has no config.json but an adapter_config.json" in message
    assert "merge_and_unload" in message


def test_pickles_are_refused(both: Path) -> None:
    (both / NATIVE_FILE).rename(both / "consolidated.00.pth")
    assert open_checkpoint(both).layout == HUGGING_FACE
    (both / "config.json").unlink()
    message = refusal(both)
    assert "pickled weights only (consolidated.00.pth), and unpickling can run code" in message
    assert "the safetensors that Mistral publishes of the same model" in message


def test_a_config_that_asks_for_a_key_to_be_ignored(native: Path) -> None:
    said = json.loads((native / "params.json").read_text())
    (native / "params.json").write_text(json.dumps(said | {"quux": 1}))
    with pytest.raises(ConfigError, match=r"params\.json says quux = 1"):
        open_checkpoint(native)
    assert open_checkpoint(native, ignore_config_keys=["quux"]).config.num_layers == 1


# ---------------------------------------------------------------------------------------------- shards


@pytest.fixture(params=[HUGGING_FACE, NATIVE])
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder with three shards and no index, and the stem of their names."""
    plain = make_checkpoint(tmp_path / "plain", num_layers=1, shards=3)
    if request.param == NATIVE:
        return as_native(plain, tmp_path / "native", shards=3, index=False), "consolidated"
    (plain / "model.safetensors.index.json").unlink()
    return plain, "model"


def test_shards_without_an_index_are_their_union(sharded: tuple[Path, str]) -> None:
    folder, stem = sharded
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert open_checkpoint(folder).tensors.keys() == names
    assert len(list(folder.glob(f"{stem}-0000?-of-00003.safetensors"))) == 3


def test_a_shard_that_the_names_count_is_missing(sharded: tuple[Path, str]) -> None:
    folder, stem = sharded
    (folder / f"{stem}-00002-of-00003.safetensors").unlink()
    message = refusal(folder)
    assert f"lacks 1 of the 3 shards that their names say there are: {stem}-00002-of-00003.safetensors" in message
    assert message.endswith("Download them.")


def test_a_tensor_in_two_shards(sharded: tuple[Path, str]) -> None:
    folder, stem = sharded
    first, second = (folder / f"{stem}-0000{number}-of-00003.safetensors" for number in (1, 2))
    name = min(load_file(first))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    assert f"holds 1 tensors that {first.name} holds as well: {name}" in refusal(folder)


@pytest.mark.parametrize("name", ["00001-of-00002", "00004-of-00003", "00000-of-00003"])
def test_shards_of_another_set(sharded: tuple[Path, str], name: str) -> None:
    folder, stem = sharded
    shutil.copy(folder / f"{stem}-00001-of-00003.safetensors", folder / f"{stem}-{name}.safetensors")
    assert "its shards are not of one set" in refusal(folder)


def test_shards_beside_a_single_file(sharded: tuple[Path, str]) -> None:
    folder, stem = sharded
    shutil.copy(folder / f"{stem}-00001-of-00003.safetensors", folder / f"{stem}.safetensors")
    assert f"has both {stem}.safetensors and shards" in refusal(folder)


def test_a_native_index_is_held_against_its_shards(tmp_path: Path) -> None:
    folder = as_native(make_checkpoint(tmp_path / "plain", num_layers=1), tmp_path / "native", shards=2)
    index = json.loads((folder / "consolidated.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "consolidated-00001-of-00002.safetensors"
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    assert "does not hold 1 tensors that consolidated.safetensors.index.json places there: more" in refusal(folder)


def test_shards_that_were_left_out_of_a_download_that_has_the_other_layout(both: Path) -> None:
    (both / HF_FILE).unlink()
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (both / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(both)
    assert message.endswith("Download them, or ask for the layout native, which the folder has as well.")
    assert open_checkpoint(both, layout=NATIVE).layout == NATIVE


# ---------------------------------------------------------------------------------------------- describe


def test_describe_reads_a_config_of_either_layout_under_any_name(both: Path, tmp_path: Path) -> None:
    config = open_checkpoint(both).config
    for name, layout in (("config.json", HUGGING_FACE), ("params.json", NATIVE)):
        file = both / name
        renamed = Path(shutil.copy(file, tmp_path / f"a {layout}.json"))
        for path in (file, renamed):
            found = describe(path)
            assert (found.layout, found.checkpoint, found.config_file) == (layout, None, path)
            # A file alone does not say how its tensors are stored; in params.json that is never said.
            assert found.config.layer_windows == config.layer_windows
            assert read_config(path) == found.config


def test_describe_opens_a_folder_with_tensors(both: Path, native: Path) -> None:
    for folder, asked, layout in ((both, None, HUGGING_FACE), (both, NATIVE, NATIVE), (native, None, NATIVE)):
        found = describe(folder, layout=asked)
        assert found.checkpoint is not None
        assert (found.layout, found.checkpoint.layout, found.checkpoint.path) == (layout, layout, folder)
        assert found.config is found.checkpoint.config
        assert found.config_file.name == ("params.json" if layout == NATIVE else "config.json")


def test_describe_takes_a_folder_without_tensors_for_its_config(both: Path) -> None:
    (both / HF_FILE).unlink()
    assert describe(both).layout == NATIVE
    assert describe(both, layout=HUGGING_FACE).checkpoint is None
    (both / NATIVE_FILE).unlink()
    found = describe(both)
    assert (found.layout, found.checkpoint, found.config_file) == (HUGGING_FACE, None, both / "config.json")
    assert describe(both, layout=NATIVE).config_file == both / "params.json"


def test_describe_refuses_as_opening_does(both: Path) -> None:
    (both / HF_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="it has 0 bytes"):
        describe(both)
    with pytest.raises(CheckpointError, match="does not exist"):
        describe(both / "absent")
    with pytest.raises(CheckpointError, match=r"has no config\.json and no params\.json"):
        describe(both.parent)
    with pytest.raises(CheckpointError, match=r"has no config\.json\. Check the path"):
        read_config(both.parent / "config.json")
