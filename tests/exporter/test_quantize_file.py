"""The weights file with quantised parameters: any reader finds them, wherever they came from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import exporter.quantize.stream
import exporter.weights
from exporter.quantize.decide import decide
from exporter.quantize.file import QuantizedFile, plan_quantized_file, write_quantized_file
from exporter.quantize.options import read_options
from exporter.quantize.rows import quantize_rows
from exporter.weights import WEIGHTS_FILE
from reference.checkpoint import SINGLE_FILE, Checkpoint, open_checkpoint
from reference.quantized_layout import QuantizedFormat, QuantizedRows, unpack
from reference.safetensors_header import ITEM_BYTES
from reference.weights import bind, load_parameter
from runtime.errors import CheckpointError, ExportError
from tests.support.bundles import checkpoint
from tests.support.checkpoints import make_checkpoint
from tests.support.native import as_native
from tests.support.quantized_checkpoints import Kind, make_quantized

OPTIONS: dict[str, dict[str, Any]] = {
    "int4": {"weights": "int4"},
    "int4, zero points": {"weights": "int4", "block_size": 16, "zero_points": True, "quantizer": "rtn"},
    "int8, float32 scales": {"weights": "int8", "scales": "float32", "block_size": 64, "zero_points": True},
    "int4, some kept": {"weights": "int4", "keep": ["attention=int8", "lm_head", "last"], "zero_points": True},
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, tied": {"dtype": "bfloat16", "tie": True},
    "odd sizes": {"dtype": "float16", "hidden_size": 36, "intermediate_size": 51, "vocab_size": 77, "head_dim": 6},
    "an expert per tensor": {"architecture": "mixtral", "dtype": "bfloat16"},
    "stacked experts": {"architecture": "mixtral", "expert_layout": "stacked", "shards": 2},
}


def planned(opened: Checkpoint, **options: Any) -> QuantizedFile:
    return plan_quantized_file(decide(opened, bind(opened), read_options(**options)))


def rows_of(tensors: dict[str, torch.Tensor], name: str, kept: QuantizedFormat) -> QuantizedRows:
    """The file's parts of a parameter as rows, experts one after the other."""
    packed, scale = tensors[f"{name}.packed"], tensors[f"{name}.scale"]
    zero = tensors.get(f"{name}.zero")
    return QuantizedRows(
        packed.reshape(-1, *packed.shape[-2:]), scale.reshape(-1, scale.shape[-1]),
        None if zero is None else zero.reshape(-1, zero.shape[-1]),
    )  # fmt: skip


def check(opened: Checkpoint, plan: QuantizedFile, path: Path, search: bool) -> None:
    """Every parameter lies in the file, in its place: kept ones as they are stored, others as their rows quantised."""
    loaded = load_file(path)
    assert loaded.keys() == plan.layout.ranges.keys()
    for name, decision in plan.decisions.by_parameter.items():
        value = load_parameter(opened, plan.decisions.sources[name], torch.float32)
        if isinstance(decision, str):
            assert torch.equal(loaded[name].float(), value), name
            continue
        expected = quantize_rows(value.reshape(-1, value.shape[-1]), decision, search=search)
        assert expected is not None
        found = rows_of(loaded, name, decision)
        assert torch.equal(found.packed, expected.packed), name
        assert torch.equal(found.scale, expected.scale), name
        assert (found.zero is None) == (not decision.zero_points)
        if found.zero is not None and expected.zero is not None:
            assert torch.equal(found.zero, expected.zero), name
        assert loaded[f"{name}.packed"].shape[:-2] == value.shape[:-1]


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("at_once", [200, 1 << 20])
def test_any_reader_finds_every_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, at_once: int
) -> None:
    for module in (exporter.quantize.stream, exporter.weights):
        monkeypatch.setattr(module, "_SLICE", at_once)
    opened = open_checkpoint(checkpoint(**CHECKPOINTS[name]))
    plan, path = planned(opened, **OPTIONS[kind]), tmp_path / WEIGHTS_FILE
    calls: list[tuple[str, int, int]] = []
    sha256 = write_quantized_file(opened, plan, path, lambda *call: calls.append(call))
    content = path.read_bytes()
    assert len(content) == plan.layout.nbytes
    assert hashlib.sha256(content).hexdigest() == sha256
    check(opened, plan, path, OPTIONS[kind].get("quantizer") != "rtn")
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == ("writing weights", plan.layout.nbytes, plan.layout.nbytes)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_begins_at_a_multiple_of_its_element(kind: str, name: str) -> None:
    layout = planned(open_checkpoint(checkpoint(**CHECKPOINTS[name])), **OPTIONS[kind]).layout
    for tensor, (begin, _) in layout.ranges.items():
        assert begin % ITEM_BYTES[layout.dtypes[tensor]] == 0, tensor


def test_zero_points_of_odd_sizes_come_last() -> None:
    plan = planned(open_checkpoint(checkpoint(**CHECKPOINTS["odd sizes"])), **OPTIONS["int4, zero points"])
    assert plan.last
    assert set(list(plan.layout.ranges)[-len(plan.last) :]) == plan.last


def test_mistrals_own_layout_is_put_in_order(tmp_path: Path) -> None:
    opened = open_checkpoint(as_native(checkpoint(dtype="bfloat16"), tmp_path / "native"))
    plan = planned(opened, weights="int4")
    assert any(getattr(source, "pairs_of_head", None) for source in plan.decisions.sources.values())
    write_quantized_file(opened, plan, tmp_path / WEIGHTS_FILE)
    check(opened, plan, tmp_path / WEIGHTS_FILE, True)


PUBLISHED = [Kind("gptq"), Kind("awq"), Kind("pack-quantized", scales="bfloat16")]


@pytest.mark.parametrize("kind", PUBLISHED, ids=lambda kind: kind.layout)
@pytest.mark.parametrize("architecture", ["mistral", "mixtral"])
def test_a_quantised_checkpoint_is_copied_number_by_number(tmp_path: Path, kind: Kind, architecture: str) -> None:
    made = make_quantized(tmp_path, kind, architecture=architecture)
    opened = open_checkpoint(made.packed)
    plan = plan_quantized_file(decide(opened, bind(opened), None))
    write_quantized_file(opened, plan, tmp_path / WEIGHTS_FILE)
    loaded = load_file(tmp_path / WEIGHTS_FILE)
    name = "layers.1.self_attn.v_proj.weight"
    decision = plan.decisions.by_parameter[name]
    assert isinstance(decision, QuantizedFormat)
    numbers, scale, zero = made.q["model.layers.1.self_attn.v_proj"]
    rows = rows_of(loaded, name, decision)
    found, points = unpack(rows, decision, numbers.shape[1])
    assert torch.equal(found.long(), torch.from_numpy(numbers))
    assert torch.equal(rows.scale.double(), torch.from_numpy(scale))
    assert torch.equal(points.long(), torch.from_numpy(zero))
    for parameter, source in plan.decisions.sources.items():
        if isinstance(plan.decisions.by_parameter[parameter], str):
            assert torch.equal(loaded[parameter].float(), load_parameter(opened, source, torch.float32))


def damaged(folder: Path, value: float, *, rows: slice = slice(3, 4)) -> Checkpoint:
    """A checkpoint with `value` in some rows of one matrix."""
    made = make_checkpoint(folder, num_layers=1)
    tensors = load_file(made / SINGLE_FILE)
    tensors["model.layers.0.mlp.up_proj.weight"][rows] = value
    save_file(tensors, made / SINGLE_FILE, metadata={"format": "pt"})
    return open_checkpoint(made)


@pytest.mark.parametrize(
    "value, rows, error, message",
    [
        (float("nan"), slice(3, 4), CheckpointError, "up_proj.weight with values that are infinite or not a number"),
        (float("inf"), slice(47, 48), CheckpointError, "up_proj.weight with values that are infinite"),
        (1e6, slice(3, 4), ExportError, "layers.0.mlp.up_proj.weight has weights so large.*--scales float32"),
        (1e-6, slice(None), ExportError, "layers.0.mlp.up_proj.weight has weights so small.*--scales float32"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    tmp_path: Path, value: float, rows: slice, error: type[Exception], message: str
) -> None:
    opened = damaged(tmp_path / "checkpoint", value, rows=rows)
    with pytest.raises(error, match=message):
        write_quantized_file(opened, planned(opened, weights="int4"), tmp_path / WEIGHTS_FILE)
    if error is ExportError:
        write_quantized_file(opened, planned(opened, weights="int4", scales="float32"), tmp_path / WEIGHTS_FILE)


def test_float64_becomes_float32(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", num_layers=1)
    tensors = {name: tensor.double() for name, tensor in load_file(folder / SINGLE_FILE).items()}
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    plan = planned(opened, weights="int4")
    write_quantized_file(opened, plan, tmp_path / WEIGHTS_FILE)
    assert plan.decisions.by_parameter["norm.weight"] == "F32"
    check(opened, plan, tmp_path / WEIGHTS_FILE, True)


def test_nothing_of_the_checkpoint_stays_mapped(tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint(dtype="bfloat16"))
    write_quantized_file(opened, planned(opened, weights="int4"), tmp_path / WEIGHTS_FILE)
    assert not opened._mapped
