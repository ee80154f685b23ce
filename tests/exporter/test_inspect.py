"""`inspect`: the published numbers from config alone, checkpoints, bundles, and tables that fit 80 columns."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from exporter.inspect import CONTEXTS, InspectReport, inspect_path, kv_use, receptive_field, render
from runtime.errors import BundleError, CheckpointError, ConfigError
from runtime.manifest import SCHEMA_VERSION
from tests.support.checkpoints import load_oracle, make_checkpoint

CONFIGS = Path(__file__).parents[1] / "support" / "configs"
EXPORTED_FUSION = {
    "nodes": {"RotaryEmbedding": 4, "GroupedQueryAttention": 0},
    "passes": [
        {"name": "canonicalise", "nodes_before": 297, "nodes_after": 152},
        {"name": "rope", "nodes_before": 152, "nodes_after": 134},
    ],
    "fusions": [
        {"rule": "rope", "scope": "layers.0", "error": 1.5e-07},
        {"rule": "rope", "scope": "layers.0", "error": 0.0},
    ],
}


def drawn(report: InspectReport, width: int = 80) -> str:
    stream = io.StringIO()
    render(report, Console(file=stream, width=width))
    text = stream.getvalue()
    # The path stands in one piece, so that it can be copied; everything else fits.
    assert all(len(line) <= width for line in text.splitlines() if report.path not in line)
    assert "…" not in text
    return text


def write_bundle(folder: Path, windows: tuple[int | None, ...] = (4, None), **changes: Any) -> Path:
    """A folder that `read_bundle` accepts: the manifest of a tiny model and files of a few bytes."""
    folder.mkdir()
    contents = {"model.onnx": b"graph", "weights.safetensors": b"weights!", "tokenizer.json": b"{}"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "blocks_sha256": None}
        for name, content in contents.items()
    }
    capacities = [20 if window is None else window + 2 for window in windows]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "cierzo_version": "0.1.0",
        "model": {
            "architecture": "ministral", "num_layers": len(windows), "hidden_size": 32, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 512, "bos_token_id": 1,
            "eos_token_ids": [2], "parameters": 12345,
        },
        "graph": {
            "file": "model.onnx", "opset": 24, "input_ids": "input_ids", "start_positions": "start_positions",
            "token_counts": "token_counts", "logit_positions": "logit_positions", "logits": "logits",
        },
        "kv": {
            "dtype": "float32", "chunk": 3, "max_batch": 5, "context": 20 if None in windows else None,
            "position_limit": None,
            "layers": [
                {
                    "window": window, "capacity": capacity, "past_key": f"past.{i}.key",
                    "past_value": f"past.{i}.value", "present_key": f"present.{i}.key",
                    "present_value": f"present.{i}.value",
                }
                for i, (window, capacity) in enumerate(zip(windows, capacities, strict=True))
            ],
        },
        "weights": {
            "kind": "stored", "arithmetic": "float32", "placement": "linked", "folder": None, "types": {"BF16": 19},
            "folded_bytes": 2048, "folding_bytes": 512, "made_bytes": 0, "making_bytes": 0,
            "files": {"weights.safetensors": entries.pop("weights.safetensors")},
        },
        "tokenizer": ["tokenizer.json"],
        "files": entries,
        "provenance": {},
        "fusion": EXPORTED_FUSION,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


# ---------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    "name, total, active, unit",
    [
        ("Mistral-7B-v0.1", "7.24", "7.24", 1e9),
        ("Mistral-7B-v0.2", "7.24", "7.24", 1e9),
        ("Mistral-7B-v0.3", "7.25", "7.25", 1e9),
        ("Mixtral-8x7B", "46.7", "12.9", 1e9),
        ("Mixtral-8x22B", "141", "39", 1e9),
        ("Mistral-Nemo-12B", "12.2", "12.2", 1e9),
        ("Mistral-Large-123B", "123", "123", 1e9),
        ("Codestral-22B", "22.2", "22.2", 1e9),
        ("Ministral-8B", "8.02", "8.02", 1e9),
    ],
)
def test_published_parameter_counts(name: str, total: str, active: str, unit: float) -> None:
    parameters = inspect_path(CONFIGS / f"{name}.json").parameters
    assert parameters.active is not None
    for number, published in ((parameters.total, total), (parameters.active, active)):
        decimals = len(published.partition(".")[2])
        assert f"{number / unit:.{decimals}f}" == published
    assert parameters.groups is not None
    assert sum(parameters.groups.values()) == parameters.total


def test_exact_counts_and_groups() -> None:
    parameters = inspect_path(CONFIGS / "Mixtral-8x7B.json").parameters
    assert (parameters.total, parameters.active) == (46_702_792_704, 12_879_925_248)
    assert parameters.groups == {
        "embedding": 32000 * 4096,
        "attention": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024),
        "experts": 32 * 8 * 3 * 4096 * 14336,
        "router": 32 * 8 * 4096,
        "norms": 65 * 4096,
        "lm_head": 32000 * 4096,
    }


def test_mistral_7b_window_arithmetic() -> None:
    report = inspect_path(CONFIGS / "Mistral-7B-v0.1.json")
    field = report.receptive_field
    assert (field.exact, field.customary) == (32 * 4095 + 1, 32 * 4096)
    by_context = {use.context: use for use in report.kv}
    assert tuple(by_context) == CONTEXTS
    per_token = 2 * 32 * 8 * 128
    assert by_context[1024].windowed_fp16 == by_context[1024].full_fp16 == 1024 * per_token * 2
    assert by_context[131_072].windowed_fp16 == 4096 * per_token * 2 == 512 * 2**20
    assert by_context[131_072].full_fp32 == 131_072 * per_token * 4 == 32 * 2**30


@pytest.mark.parametrize(
    "windows, exact, customary",
    [((5, 5), 9, 10), ((1,), 1, 1), ((3, 7, 2), 10, 12), ((5, None), None, None), ((None,), None, None)],
)
def test_receptive_field(windows: tuple[int | None, ...], exact: int | None, customary: int | None) -> None:
    field = receptive_field(windows)
    assert (field.exact, field.customary) == (exact, customary)


def test_the_exact_receptive_field_is_what_the_model_shows(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=3, window=4)
    exact = inspect_path(folder).receptive_field.exact
    assert exact == 10
    model, ids = load_oracle(folder), torch.arange(3, 23)[None]
    changed = ids.clone()
    changed[0, 0] = 60
    with torch.no_grad():
        moved = (model(ids, use_cache=False).logits != model(changed, use_cache=False).logits).any(-1)[0]
    assert moved.nonzero().max().item() == exact - 1


def test_kv_of_mixed_layers() -> None:
    use = kv_use((4, None), num_kv_heads=2, head_dim=8, context=10)
    assert use.windowed_fp32 == (4 + 10) * 2 * 2 * 8 * 4
    assert use.full_fp16 == (10 + 10) * 2 * 2 * 8 * 2


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"tie": True, "dtype": "bfloat16", "shards": 3},
        {"architecture": "mixtral", "num_experts": 4, "top_k": 1},
        {"architecture": "mixtral", "expert_layout": "stacked"},
        {"architecture": "ministral", "layer_windows": [5, None]},
    ],
    ids=str,
)
def test_a_checkpoint_has_the_parameters_of_transformers(tmp_path: Path, case: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path, **case)
    report = inspect_path(folder)
    assert report.kind == "checkpoint"
    assert report.parameters.total == sum(parameter.numel() for parameter in load_oracle(folder).parameters())
    assert report.stored is not None
    assert report.stored.files == case.get("shards", 1)
    assert report.stored.bytes == report.parameters.total * (2 if case.get("dtype") == "bfloat16" else 4)
    assert sum(report.stored.dtypes.values()) == report.stored.tensors
    assert inspect_path(folder / "config.json").parameters == report.parameters


def test_unused_tensors_are_listed_with_the_reason(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.rotary_emb.inv_freq": torch.ones(4)}, file)
    report = inspect_path(folder)
    assert report.stored is not None
    assert list(report.stored.unused) == ["model.rotary_emb.inv_freq"]
    assert "follow from config.json" in drawn(report)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_path(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect_path(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="bert"):
        inspect_path(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "quux": 1}')
    assert inspect_path(tmp_path, ignore_config_keys=["quux"]).model.num_layers == 32


# ---------------------------------------------------------------------------------------------- bundles


def test_a_bundle(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    report = inspect_path(folder)
    assert report == inspect_path(folder / "manifest.json")
    assert (report.kind, report.parameters.total, report.parameters.active) == ("bundle", 12345, None)
    assert report.receptive_field.layer_windows == (4, None)
    bundle = report.bundle
    assert bundle is not None
    assert bundle.capacities == (6, 20)
    assert bundle.kv_bytes_per_row == 2 * 2 * 8 * 4 * (6 + 20)
    assert bundle.kv_bytes == 5 * bundle.kv_bytes_per_row
    assert bundle.files == {"model.onnx": 5, "tokenizer.json": 2, "weights.safetensors": 8}
    assert (bundle.arithmetic, bundle.weights_types, bundle.folded_bytes) == ("float32", {"BF16": 19}, 2048)
    assert (bundle.weights_placement, bundle.weights_folder) == ("linked", None)
    assert bundle.fusion == EXPORTED_FUSION


def test_the_fusion_report_is_drawn_by_pass(tmp_path: Path) -> None:
    text = drawn(inspect_path(write_bundle(tmp_path / "bundle")))
    assert "297 → 152" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith("rope")] == [
        ["rope", "2", "layers.0", "1.5e-07", "152", "→", "134"]
    ]
    assert "GroupedQueryAttention" not in text  # none is left in the model


def test_a_bundle_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        inspect_path(folder)


def test_torch_and_onnx_are_not_needed(tmp_path: Path) -> None:
    paths = [write_bundle(tmp_path / "bundle"), make_checkpoint(tmp_path / "checkpoint", num_layers=1)]
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'safetensors', 'transformers'): sys.modules[name] = None\n"
        "from exporter.inspect import inspect_path\n"
        "print(*(inspect_path(path).kind for path in sys.argv[1:]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["bundle", "checkpoint"], done.stderr


# ---------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_reports_are_json_and_fit_80_columns(path: Path) -> None:
    report = inspect_path(path, text_only=True)
    plain = report.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["parameters"]["total"] == report.parameters.total
    assert (plain["stored"], plain["bundle"]) == (None, None)
    assert f"{report.parameters.total:,}" in drawn(report)


def test_what_is_drawn_for_a_sliding_model() -> None:
    text = drawn(inspect_path(CONFIGS / "Mistral-7B-v0.1.json"))
    for words in ("7.24 B", "32 of 32 layers (0-31)", "131,041 tokens exactly, L·(W − 1) + 1", "131,072 tokens, L·W"):
        assert words in text
    assert "no window" in text


def test_what_is_drawn_for_experts_and_full_attention() -> None:
    text = drawn(inspect_path(CONFIGS / "Mixtral-8x7B.json"))
    for words in ("46.7 B", "12.9 B active per token", "8, of which each token visits 2", "unbounded", "experts"):
        assert words in text
    assert "no window" not in text


def test_what_is_drawn_for_mixed_windows_and_brackets_in_a_path(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "[red]", architecture="ministral", num_layers=5, layer_windows=[5, None, 5, 5, None]
    )
    text = drawn(inspect_path(folder))
    assert "[red]" in text
    assert "3 of 5 layers (0, 2-3)" in text
    assert "2 of 5 layers (1, 4)" in text


def test_what_is_drawn_for_a_bundle(tmp_path: Path) -> None:
    text = drawn(inspect_path(write_bundle(tmp_path / "bundle")))
    for words in (
        "19 BF16; linked from the checkpoint",
        "2.00 KiB",
        "1 x 6, 1 x 20 (float32)",
        "RotaryEmbedding",
        "1.5e-07",
        "weights.safetensors",
    ):
        assert words in text
    sliding = drawn(inspect_path(write_bundle(tmp_path / "sliding", windows=(3, 4))))
    assert "unbounded, every layer slides" in sliding
    assert "6 tokens exactly, 1 + Σ(W − 1)" in sliding
