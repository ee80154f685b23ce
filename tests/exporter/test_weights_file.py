"""The weights file: every parameter in float32, streamed, where the graph looks for it."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import exporter.weights
from exporter.weights import WEIGHTS_FILE, bind_weights, weight_bytes, write_weights
from graph_passes.unbound import UnboundWeight
from reference.checkpoint import SINGLE_FILE, open_checkpoint
from reference.weights import bind, load_parameter
from runtime.errors import CheckpointError, TraceError
from tests.support.bundles import checkpoint
from tests.support.checkpoints import make_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, tied": {"dtype": "bfloat16", "tie": True},
    "float16, shards": {"dtype": "float16", "shards": 3},
    "an expert per tensor": {"architecture": "mixtral"},
    "stacked experts": {"architecture": "mixtral", "expert_layout": "stacked", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at_once", [7, 1 << 22])
def test_any_reader_finds_every_parameter_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at_once: int
) -> None:
    monkeypatch.setattr(exporter.weights, "_SLICE", at_once)
    opened = open_checkpoint(checkpoint(**CASES[name]))
    sources = bind(opened)
    calls: list[tuple[str, int, int]] = []
    written = write_weights(opened, sources, tmp_path / WEIGHTS_FILE, lambda *call: calls.append(call))
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    assert len(content) == written.nbytes
    assert hashlib.sha256(content).hexdigest() == written.sha256
    loaded = load_file(tmp_path / WEIGHTS_FILE)
    assert loaded.keys() == sources.keys() == written.offsets.keys()
    for parameter, source in sources.items():
        expected = load_parameter(opened, source, torch.float32)
        assert loaded[parameter].dtype == torch.float32
        assert torch.equal(loaded[parameter], expected), parameter
        offset, length = written.offsets[parameter]
        assert content[offset : offset + length] == expected.numpy().tobytes(), parameter
    total = weight_bytes(sources)
    assert total == sum(4 * math.prod(source.shape) for source in sources.values())
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == ("writing weights", total, total)


def test_the_data_begin_on_a_page_in_the_order_of_the_model(tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint())
    written = write_weights(opened, bind(opened), tmp_path / WEIGHTS_FILE)
    begins = [offset for offset, _ in written.offsets.values()]
    ends = [offset + length for offset, length in written.offsets.values()]
    assert begins[0] % 4096 == 0
    assert begins[1:] == ends[:-1]
    assert ends[-1] == written.nbytes
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
        write_weights(opened, bind(opened), tmp_path / WEIGHTS_FILE)
        assert load_file(tmp_path / WEIGHTS_FILE)["norm.weight"][0] == torch.tensor(value)
        return
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight with values that float32 cannot hold"):
        write_weights(opened, bind(opened), tmp_path / WEIGHTS_FILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", num_layers=1)
    tensors = load_file(folder / SINGLE_FILE)
    damaged = tensors["model.layers.0.mlp.down_proj.weight"].to(dtype)
    damaged[3, 5] = value
    tensors["model.layers.0.mlp.down_proj.weight"] = damaged
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight with values that are infinite or not a number"):
        write_weights(opened, bind(opened), tmp_path / WEIGHTS_FILE)


def graph_with(shapes: dict[str, tuple[int, ...]]) -> ir.Model:
    """A model that consists of unbound weights."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="weights")
    for name, shape in shapes.items():
        weight = UnboundWeight(name, ir.DataType.FLOAT, ir.Shape(shape))
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=weight)
        graph.register_initializer(value)
    return ir.Model(graph, ir_version=11)


def test_bound_weights_read_back_as_the_parameters(tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint(architecture="mixtral"))
    sources = bind(opened)
    written = write_weights(opened, sources, tmp_path / WEIGHTS_FILE)
    model = graph_with({name: source.shape for name, source in sources.items()})
    bind_weights(model, written, tmp_path)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.location == WEIGHTS_FILE
        expected = load_parameter(opened, sources[name], torch.float32)
        assert torch.equal(torch.from_numpy(tensor.numpy().copy()), expected), name


def test_graph_and_file_must_name_the_same_parameters(tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint())
    sources = bind(opened)
    written = write_weights(opened, sources, tmp_path / WEIGHTS_FILE)
    shapes = {name: source.shape for name, source in sources.items()}
    short = dict(shapes)
    del short["norm.weight"]
    with pytest.raises(TraceError, match=r"1 differ: \['norm\.weight'\]"):
        bind_weights(graph_with(short), written, tmp_path)
    with pytest.raises(TraceError, match=r"1 differ: \['odd'\]"):
        bind_weights(graph_with(shapes | {"odd": (3,)}), written, tmp_path)
    with pytest.raises(TraceError, match=r"norm\.weight has 124 bytes in the graph and 128 in the weights file"):
        bind_weights(graph_with(shapes | {"norm.weight": (31,)}), written, tmp_path)
