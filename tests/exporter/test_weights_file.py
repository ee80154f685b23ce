"""The weights file: every parameter, streamed, converted or in the type that it has."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import exporter.weights
from exporter.weights import WEIGHTS_FILE, plan_file, write_weights
from reference.checkpoint import SINGLE_FILE, Checkpoint, open_checkpoint
from reference.weights import bind, load_parameter
from runtime.errors import CheckpointError
from tests.support.bundles import checkpoint
from tests.support.checkpoints import make_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, tied": {"dtype": "bfloat16", "tie": True},
    "float16, shards": {"dtype": "float16", "shards": 3},
    "an expert per tensor": {"architecture": "mixtral"},
    "stacked experts": {"architecture": "mixtral", "expert_layout": "stacked", "dtype": "bfloat16"},
}


def write(opened: Checkpoint, path: Path, kind: str = "fp32", calls: list[tuple[str, int, int]] | None = None) -> str:
    sources = bind(opened)
    progress = None if calls is None else lambda *call: calls.append(call)
    return write_weights(opened, sources, plan_file(opened, sources, kind), path, progress)


@pytest.mark.parametrize("kind", ["fp32", "stored"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_any_reader_finds_every_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at_once: int, kind: str
) -> None:
    monkeypatch.setattr(exporter.weights, "_SLICE", at_once)
    opened = open_checkpoint(checkpoint(**CASES[name]))
    sources = bind(opened)
    dtype = getattr(torch, CASES[name].get("dtype", "float32")) if kind == "stored" else torch.float32
    calls: list[tuple[str, int, int]] = []
    sha256 = write(opened, tmp_path / WEIGHTS_FILE, kind, calls)
    planned = plan_file(opened, sources, kind)
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    assert len(content) == planned.nbytes
    assert hashlib.sha256(content).hexdigest() == sha256
    loaded = load_file(tmp_path / WEIGHTS_FILE)
    assert loaded.keys() == sources.keys() == planned.ranges.keys()
    for parameter, source in sources.items():
        expected = load_parameter(opened, source, torch.float32)
        assert loaded[parameter].dtype == dtype
        assert torch.equal(loaded[parameter].float(), expected), parameter
        begin, end = planned.ranges[parameter]
        assert content[begin:end] == bytes(loaded[parameter].view(torch.uint8).flatten().tolist()), parameter
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == ("writing weights", planned.nbytes, planned.nbytes)


def test_a_parameter_of_several_types_becomes_float32(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", num_layers=1, architecture="mixtral", dtype="bfloat16")
    tensors = load_file(folder / SINGLE_FILE)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name].half()
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    write(opened, tmp_path / WEIGHTS_FILE, "stored")
    loaded = load_file(tmp_path / WEIGHTS_FILE)
    assert loaded["layers.0.moe.gate_proj"].dtype == torch.float32
    assert loaded["layers.0.moe.up_proj"].dtype == torch.bfloat16
    assert torch.equal(
        loaded["layers.0.moe.gate_proj"], load_parameter(opened, bind(opened)["layers.0.moe.gate_proj"], torch.float32)
    )


def test_the_data_begin_on_a_page_in_the_order_of_the_model(tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint())
    planned = plan_file(opened, bind(opened), "fp32")
    begins = [begin for begin, _ in planned.ranges.values()]
    ends = [end for _, end in planned.ranges.values()]
    assert begins[0] % 4096 == 0
    assert begins[1:] == ends[:-1]
    assert ends[-1] == planned.nbytes
    assert [math.prod(source.shape) * 4 for source in bind(opened).values()] == [
        end - begin for begin, end in planned.ranges.values()
    ]
    write(opened, tmp_path / WEIGHTS_FILE)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("value,refused", [(3e38, False), (1e39, True), (-1e39, True)])
def test_float64_beyond_float32_is_refused(tmp_path: Path, value: float, refused: bool) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", num_layers=1)
    tensors = load_file(folder / SINGLE_FILE)
    tensors["model.norm.weight"] = torch.full((32,), value, dtype=torch.float64)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    if not refused:
        write(opened, tmp_path / WEIGHTS_FILE)
        assert load_file(tmp_path / WEIGHTS_FILE)["norm.weight"][0] == torch.tensor(value)
        return
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight with values that float32 cannot hold"):
        write(opened, tmp_path / WEIGHTS_FILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["fp32", "stored"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, dtype: torch.dtype, value: float, kind: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", num_layers=1)
    tensors = load_file(folder / SINGLE_FILE)
    damaged = tensors["model.layers.0.mlp.down_proj.weight"].to(dtype)
    damaged[3, 5] = value
    tensors["model.layers.0.mlp.down_proj.weight"] = damaged
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight with values that are infinite or not a number"):
        write(opened, tmp_path / WEIGHTS_FILE, kind)
