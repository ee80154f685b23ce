"""`cierzo inspect` of a quantised checkpoint: how it is packed, and which of its tensors are left unread."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from exporter.inspect import inspect_path, render
from tests.support.checkpoints import make_checkpoint
from tests.support.quantized_checkpoints import Kind, edit_tensors, make_quantized


def test_how_a_checkpoint_is_packed(tmp_path: Path) -> None:
    made = make_quantized(tmp_path, Kind("gptq", symmetric=True), num_layers=1)
    bias = "model.layers.0.mlp.up_proj.bias"
    edit_tensors(made.packed, {bias: torch.zeros(96, dtype=torch.float16)})
    report = inspect_path(made.packed)
    assert report.model.quantization == "gptq: 4 bits, symmetric, groups of 32"
    assert report.parameters == inspect_path(made.plain).parameters
    assert report.stored is not None
    assert report.stored.unused == {bias: "it is a bias of zeros, which AutoGPTQ gave to every layer"}
    assert report.stored.dtypes["I32"] == 3 * 7
    console = Console(file=io.StringIO(), width=80)
    render(report, console)
    assert isinstance(console.file, io.StringIO)
    assert "gptq: 4 bits, symmetric, groups of 32" in console.file.getvalue()


def test_a_config_alone_says_it_too(tmp_path: Path) -> None:
    made = make_quantized(tmp_path, Kind("int-quantized", bits=8, group=-1, symmetric=True), num_layers=1)
    report = inspect_path(made.packed / "config.json")
    assert report.model.quantization == "compressed-tensors: 8 bits, symmetric, a scale per row (int-quantized)"
    assert inspect_path(make_checkpoint(tmp_path / "other", num_layers=1)).model.quantization is None
