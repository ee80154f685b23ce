"""Opening checkpoints: single files and shards, zero-copy reads, and files damaged in every way we could think of."""

from __future__ import annotations

import gc
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.checkpoint import SINGLE_FILE, open_checkpoint, read_config, torch_dtype
from reference.safetensors_header import ITEM_BYTES, read_header
from runtime.errors import CheckpointError, ConfigError
from tests.support.checkpoints import make_checkpoint


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a safetensors file, read without Cierzo."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", num_layers=1, tokenizer=True)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_what_safetensors_reads(tmp_path: Path, shards: int, dtype: str) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1, shards=shards, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    expected: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        expected |= load_file(file)
    assert len({entry.file for entry in checkpoint.tensors.values()}) == shards
    assert list(checkpoint.tensors) == sorted(expected)
    for name, tensor in expected.items():
        ours = checkpoint.read(name)
        assert ours.dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(ours, tensor)
        assert bytes(checkpoint.read_bytes(name)) == tensor.view(torch.uint8).numpy().tobytes()


def test_the_offset_is_absolute(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    content = (folder / SINGLE_FILE).read_bytes()
    for name, entry in checkpoint.tensors.items():
        assert content[entry.offset : entry.offset + entry.nbytes] == bytes(checkpoint.read_bytes(name))


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_of_the_format(tmp_path: Path, folder: Path, dtype: str) -> None:
    raw = torch.arange(3 * ITEM_BYTES[dtype], dtype=torch.uint8) % 2
    tensors = {"one": raw.view(torch_dtype(dtype)), "odd": torch.ones(3, dtype=torch.uint8), "zero": torch.ones(2, 0)}
    save_file(tensors | {"scalar": torch.tensor(7)}, folder / SINGLE_FILE)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["one"].dtype == dtype
    assert torch.equal(checkpoint.read("one").view(torch.uint8), raw)
    assert checkpoint.read("zero").shape == (2, 0)
    assert len(checkpoint.read_bytes("zero")) == 0
    assert checkpoint.read("scalar").item() == 7
    assert checkpoint.read("scalar").shape == ()


def test_an_unaligned_tensor_is_read(folder: Path) -> None:
    join(
        folder / SINGLE_FILE,
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        },
        b"\x01" + struct.pack("<2f", 1.5, -2.0),
    )
    assert open_checkpoint(folder).read("b").tolist() == [1.5, -2.0]


def test_reading_copies_nothing_warns_of_nothing_and_never_writes_to_the_file(folder: Path) -> None:
    before = (folder / SINGLE_FILE).read_bytes()
    checkpoint = open_checkpoint(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = checkpoint.read("model.norm.weight"), checkpoint.read("model.norm.weight")
    assert first.data_ptr() == second.data_ptr()
    first.fill_(9.0)
    assert second[0] == 9.0
    assert (folder / SINGLE_FILE).read_bytes() == before


def test_a_tensor_outlives_its_checkpoint_and_the_mapping_goes_with_the_last_tensor(folder: Path) -> None:
    expected = load_file(folder / SINGLE_FILE)["model.norm.weight"]
    checkpoint = open_checkpoint(folder)
    mapped = checkpoint._mapped
    tensor = checkpoint.read("model.norm.weight")
    del checkpoint
    gc.collect()
    assert torch.equal(tensor, expected)
    assert len(mapped) == 1
    del tensor
    gc.collect()
    assert len(mapped) == 0


def test_tokenizer_files(tmp_path: Path, folder: Path) -> None:
    assert [file.name for file in open_checkpoint(folder).tokenizer_files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    for name in ("tokenizer.model.v3", "tekken.json", "tokenizer.model", "tokenizer.model.v1", "tokenizer.py"):
        (folder / name).write_bytes(b"")
    (folder / "tokenizer.model.d").mkdir()
    assert [file.name for file in open_checkpoint(folder).tokenizer_files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "tekken.json",
        "tokenizer.model",
        "tokenizer.model.v1",
        "tokenizer.model.v3",
    ]
    assert open_checkpoint(make_checkpoint(tmp_path / "bare", num_layers=1)).tokenizer_files == ()


def test_an_unknown_tensor_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing'"):
        open_checkpoint(folder).read("model.nothing")


def test_a_file_that_shrinks_after_opening_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.read("model.norm.weight")
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        checkpoint.read("model.norm.weight")


def test_config_keys_can_be_ignored(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quux": 1}))
    with pytest.raises(ConfigError, match="quux"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, ignore_config_keys=["quux"]).config.num_layers == 1


# ---------------------------------------------------------------------------------------------- damaged files


def test_a_truncated_file_says_how_many_bytes_are_missing(folder: Path) -> None:
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    assert "it is truncated: 100 of" in refusal(folder)


def test_a_file_that_ends_within_its_header_says_by_how_many_bytes(folder: Path) -> None:
    file = folder / SINGLE_FILE
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    file.write_bytes(content[: 8 + length - 13])
    assert "it ends 13 bytes before the end of its header" in refusal(folder)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "it has 0 bytes"),
        (b"\x01\x02\x03", "it has 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "more than the 100000000 that the format allows"),
        (struct.pack("<Q", 4) + b"[1] ", "not a JSON object"),
        (struct.pack("<Q", 4) + b"{,,}", "not the JSON that the format asks for"),
        (struct.pack("<Q", 4) + b'{"\xff}', "not the JSON that the format asks for"),
        (struct.pack("<Q", 17) + b'{"a": 1, "a": 2} ', "'a' is there twice"),
    ],
    ids=["empty", "short", "pointer", "list", "syntax", "encoding", "twice"],
)
def test_no_header(folder: Path, content: bytes, words: str) -> None:
    (folder / SINGLE_FILE).write_bytes(content)
    assert words in refusal(folder)


def _with(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["model.norm.weight"].update(changes)


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["model.norm.weight"].pop(key)


@pytest.mark.parametrize(
    "damage, words",
    [
        (_with(dtype="F4"), "of dtype 'F4', and Cierzo reads"),
        (_with(dtype=4), "of dtype 4, and Cierzo reads"),
        (_with(dtype="BF16"), "has 128 bytes, but BF16 of shape [32] takes 64"),
        (_with(shape=[31]), "has 128 bytes, but F32 of shape [31] takes 124"),
        (_with(shape=[-32]), "has shape [-32]"),
        (_with(shape=[32.0]), "has shape [32.0]"),
        (_with(shape=[True]), "has shape [True]"),
        (_with(shape="32"), "has shape '32'"),
        (_with(data_offsets=[128, 0]), "data_offsets [128, 0]"),
        (_with(data_offsets=[0]), "data_offsets [0]"),
        (_without("dtype"), "is not described by dtype, shape and data_offsets"),
        (_without("shape"), "is not described by"),
        (_with(extra=1), "is not described by"),
        (lambda header: header.update({"model.norm.weight": [1]}), "is not described by"),
        (lambda header: header.pop("model.norm.weight"), "bytes follow its last tensor"),
        (lambda header: header.pop("lm_head.weight"), "bytes between the header and tensor"),
        (lambda header: header.update(copy=dict(header["model.norm.weight"])), "overlaps tensor"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file(
    folder: Path, damage: Callable[[dict[str, Any]], object], words: str
) -> None:
    header, data = split(folder / SINGLE_FILE)
    damage(header)
    join(folder / SINGLE_FILE, header, data)
    assert words in refusal(folder)


def test_surplus_bytes_at_the_end(folder: Path) -> None:
    with (folder / SINGLE_FILE).open("ab") as stream:
        stream.write(b"12345")
    assert "5 bytes follow its last tensor" in refusal(folder)


def test_metadata_is_not_a_tensor(folder: Path) -> None:
    header, _ = split(folder / SINGLE_FILE)
    assert "__metadata__" in header
    assert "__metadata__" not in read_header(folder / SINGLE_FILE)


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")


# ---------------------------------------------------------------------------------------------- folders


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "is a file" in refusal(folder / "config.json")
    (folder / "config.json").unlink()
    assert "has no config.json and no params.json, so it is" in refusal(folder)


@pytest.mark.parametrize("text, words", [("{", "not readable JSON"), ("[]", "an object belongs there")])
def test_a_config_that_is_no_json_object(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_config(folder / "config.json")


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_no_weights_or_those_of_something_else(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "adapter_model.safetensors")
    assert "neither model.safetensors nor model.safetensors.index.json, only adapter_model" in refusal(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert "no safetensors file at all" in refusal(folder)
