"""An export with quantised weights: a bundle that says what it is, loads, and computes near the dequantised model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from exporter import export
from exporter.cli import cli
from exporter.weights import WEIGHTS_FILE
from reference.checkpoint import open_checkpoint
from reference.model import Model
from reference.quantized_layout import QuantizedFormat, QuantizedRows, dequantize
from reference.weights import EMBEDDING, LM_HEAD, bind, load_parameter
from runtime import load
from runtime.errors import ExportError
from runtime.manifest import parse_manifest
from tests.support.bundles import checkpoint, shared_traces
from tests.support.quantized_checkpoints import Kind, make_quantized

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def made(source: Path, out: Path, **options: Any) -> Path:
    with shared_traces():
        return export(source, out, chunk=4, prove=False, **options)


def manifest_of(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def dequantised(bundle: Path, source: Path) -> Model:
    """The reference model in float64 with the values that the bundle's file holds, put together by its manifest."""
    config = open_checkpoint(source).config
    how = manifest_of(bundle)["weights"]["quantization"]
    model = Model(config, device="meta")
    tensors = load_file(bundle / WEIGHTS_FILE)
    values = {}
    for name, tensor in tensors.items():
        if not name.endswith((".packed", ".scale", ".zero")):
            values[name] = tensor.double()
            continue
        if not name.endswith(".packed"):
            continue
        parameter = name.removesuffix(".packed")
        shape = model.state_dict()[parameter].shape
        scale, zero = tensors[f"{parameter}.scale"], tensors.get(f"{parameter}.zero")
        bits = 8 if how["kept"].get(parameter) == "int8" else how["bits"]
        kind = {"float16": "F16", "float32": "F32"}[how["scales"]]
        form = QuantizedFormat(bits, how["block_size"], how["zero_points"], kind)
        rows = QuantizedRows(tensor.flatten(0, -3), scale.flatten(0, -2), None if zero is None else zero.flatten(0, -2))
        values[parameter] = dequantize(rows, form, shape[-1], torch.float64).view(shape)
    if config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, device="meta"))
        values.setdefault(LM_HEAD, values[EMBEDDING])
    model.load_state_dict(values, assign=True)
    return model


def logits(bundle: Path) -> np.ndarray[Any, Any]:
    return np.asarray(load(bundle, threads=1).forward(np.array(TOKENS, dtype=np.int64))[0])


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "int4": ({"dtype": "bfloat16"}, {"weights": "int4"}, 4),
    "int8, zero points": ({}, {"weights": "int8", "zero_points": True, "scales": "float32"}, 8),
    "int4, tied": ({"dtype": "float16", "tie": True}, {"weights": "int4", "block_size": 16, "zero_points": True}, 4),
    "int4 experts": ({"architecture": "mixtral", "dtype": "bfloat16"}, {"weights": "int4", "quantizer": "rtn"}, 4),
    "int4, kept": ({"dtype": "bfloat16"}, {"weights": "int4", "keep": ["lm_head", "first=int8"]}, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bundle_computes_with_the_dequantised_weights(tmp_path: Path, name: str) -> None:
    settings, options, bits = CASES[name]
    source = checkpoint(**settings)
    bundle = made(source, tmp_path / "bundle", **options)
    parsed = parse_manifest((bundle / "manifest.json").read_bytes())
    weights = parsed.weights
    assert (weights.kind, weights.placement, list(weights.files)) == (options["weights"], "copied", [WEIGHTS_FILE])
    assert weights.quantization is not None
    assert weights.quantization.bits == bits
    assert weights.types["U8"] > 0
    assert parsed.kv.dtype == "float16"
    with torch.no_grad():
        truth = dequantised(bundle, source)(torch.tensor([TOKENS]))[0].numpy()
    found = logits(bundle)
    # Kernels round the activations to 8 bits, and the rings hold float16: near, and far nearer than any other weights.
    gap = np.abs(found - truth).max() / np.abs(truth).max()
    assert gap < 0.1
    shuffled = np.abs(found - np.roll(truth, 1, axis=0)).max() / np.abs(truth).max()
    assert shuffled > 4 * gap


def test_the_manifest_says_how(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "weights": "int4", "block_size": 16, "zero_points": True, "scales": "float32", "quantizer": "rtn",
        "keep": ["lm_head=int8", "first"],
    }  # fmt: skip
    manifest = manifest_of(made(checkpoint(dtype="bfloat16"), tmp_path / "bundle", **options))
    parts = [*(f"self_attn.{name}" for name in "qkvo"), *(f"mlp.{name}" for name in ("gate", "up", "down"))]
    first = [f"layers.0.{part}_proj.weight" for part in parts]
    assert manifest["weights"]["quantization"] == {
        "bits": 4, "block_size": 16, "zero_points": True, "scales": "float32", "method": "rtn",
        "kept": {"embed_tokens.weight": "BF16", **dict.fromkeys(first, "BF16"), "lm_head.weight": "int8"},
    }  # fmt: skip
    assert {key: manifest["provenance"]["options"][key] for key in options} == options
    assert manifest["model"]["parameters"] == manifest_of(made(checkpoint(), tmp_path / "plain"))["model"]["parameters"]


@pytest.mark.parametrize("weights, kind, method", [("stored", "stored", "checkpoint"), ("int4", "int4", "checkpoint")])
def test_a_quantised_checkpoint_is_copied(tmp_path: Path, weights: str, kind: str, method: str) -> None:
    source = make_quantized(tmp_path, Kind("gptq", group=16), hidden_size=32, intermediate_size=48)
    options: dict[str, Any] = {} if weights == "stored" else {"keep": ["lm_head"]}
    bundle = made(source.packed, tmp_path / "bundle", weights=weights, **options)
    info = parse_manifest((bundle / "manifest.json").read_bytes()).weights
    assert info.quantization is not None
    assert (info.kind, info.placement, info.quantization.method) == (kind, "copied", method)
    with torch.no_grad():
        truth = dequantised(bundle, source.packed)(torch.tensor([TOKENS]))[0].numpy()
        opened = open_checkpoint(source.plain)
        plain = Model(opened.config, device="meta")
        values = {name: load_parameter(opened, part, torch.float64) for name, part in bind(opened).items()}
        plain.load_state_dict(values, assign=True)
        assert np.allclose(truth, plain(torch.tensor([TOKENS]))[0].numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(logits(bundle) - truth).max() < 0.1 * np.abs(truth).max()


def test_a_quantised_checkpoint_becomes_float32(tmp_path: Path) -> None:
    source = make_quantized(tmp_path, Kind("awq", group=16), hidden_size=32, intermediate_size=48)
    bundle = made(source.packed, tmp_path / "bundle", weights="fp32")
    plain = made(source.plain, tmp_path / "as_it_was")
    assert manifest_of(bundle)["weights"]["quantization"] is None
    assert np.abs(logits(bundle) - logits(plain)).max() < 1e-4


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    for options in ({"weights": "int4", "keep": ["nothing"]}, {"weights": "fp32", "block_size": 32}):
        with pytest.raises(ExportError):
            made(checkpoint(), tmp_path / "bundle", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_passes_everything_on(tmp_path: Path) -> None:
    asked_for = "--weights int4 --block-size 16 --zero-points --scales float32 --quantizer rtn"
    others = "--keep lm_head=int8 --keep first --chunk 4 --no-prove --json"
    arguments = [
        "export",
        str(checkpoint(dtype="bfloat16")),
        str(tmp_path / "bundle"),
        *f"{asked_for} {others}".split(),
    ]
    with shared_traces():
        result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    asked = manifest_of(tmp_path / "bundle")["provenance"]["options"]
    expected = {
        "weights": "int4", "block_size": 16, "zero_points": True, "scales": "float32", "quantizer": "rtn",
        "keep": ["lm_head=int8", "first"],
    }  # fmt: skip
    assert {key: asked[key] for key in expected} == expected


def test_the_command_refuses_in_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["export", str(checkpoint()), str(tmp_path / "bundle"), "--keep", "lm_head"])
    assert result.exit_code == 2
    assert "keep only mean something with quantised weights" in " ".join(result.output.split())
