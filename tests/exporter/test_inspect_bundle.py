"""`inspect` on a bundle: what its manifest says, which nodes run natively here, and what a session takes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from exporter.inspect import inspect_path
from runtime.bundle import read_bundle
from runtime.errors import BundleError
from runtime.estimate import estimate
from runtime.kernels import Kernels, kernels, why_none
from runtime.manifest import SCHEMA_VERSION
from tests.support.checkpoints import make_checkpoint
from tests.support.inspecting import drawn

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

GRAPH = helper.make_model(
    helper.make_graph(
        [
            *(helper.make_node(op, ["x"], ["y"], domain="cierzo") for op in ("RMSNorm", "RMSNorm", "NoKernelHasThis")),
            helper.make_node("RMSNorm", ["x"], ["y"], domain="of.another"),
            helper.make_node("Add", ["x", "x"], ["y"]),
        ],
        "graph", [], [],
    )
).SerializeToString()  # fmt: skip


def write_bundle(folder: Path, windows: tuple[int | None, ...] = (4, None), **changes: Any) -> Path:
    """A folder that `read_bundle` accepts: the manifest of a tiny model and files of a few bytes."""
    folder.mkdir()
    contents = {"model.onnx": GRAPH, "weights.safetensors": b"weights!", "tokenizer.json": b"{}"}
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
            "folded_bytes": 2048, "folding_bytes": 512, "made_bytes": 2048, "making_bytes": 0,
            "quantization": None,
            "files": {"weights.safetensors": entries.pop("weights.safetensors")},
        },
        "tokenizer": ["tokenizer.json"],
        "files": entries,
        "provenance": {},
        "fusion": EXPORTED_FUSION,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


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
    assert bundle.files == {"model.onnx": len(GRAPH), "tokenizer.json": 2, "weights.safetensors": 8}
    assert (bundle.arithmetic, bundle.weights_types, bundle.folded_bytes) == ("float32", {"BF16": 19}, 2048)
    assert (bundle.weights_placement, bundle.weights_folder) == ("linked", None)
    assert bundle.fusion == EXPORTED_FUSION
    manifest = read_bundle(folder).manifest
    active = kernels() is not None
    assert bundle.memory == estimate(manifest, kernels_active=active)
    assert bundle.memory_of_all_rows == estimate(manifest, batch=5, kernels_active=active)
    plain = report.to_json()["bundle"]["memory"]
    assert plain["total"] == sum(plain[part] for part in ("weights", "folded", "kv", "buffers", "overhead"))


def test_a_bundle_says_which_of_its_nodes_run_natively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, library = write_bundle(tmp_path / "bundle"), tmp_path / "kernels.so"
    monkeypatch.setattr("runtime.kernels.kernels", lambda: Kernels(library, "avx2", ("RMSNorm", "RotaryEmbedding")))
    found = inspect_path(folder).to_json()["bundle"]["kernels"]
    assert found == {
        "library": str(library),
        "isa": "avx2",
        "native": {"RMSNorm": 2},
        "bodies": {"NoKernelHasThis": 1},
        "standard": {"Add": 1, "RMSNorm": 1},
        "reason": None,
    }
    text = " ".join(drawn(inspect_path(folder)).split())
    assert "instructions avx2 native 2 x RMSNorm portable bodies 1 x NoKernelHasThis" in text


def test_a_bundle_says_why_no_node_runs_natively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIERZO_KERNELS", "off")
    report = inspect_path(write_bundle(tmp_path / "bundle"))
    found = report.to_json()["bundle"]["kernels"]
    assert (found["library"], found["isa"], found["native"]) == (None, None, {})
    assert found["bodies"] == {"RMSNorm": 2, "NoKernelHasThis": 1}
    assert found["reason"] == why_none()
    assert "CIERZO_KERNELS=off" in drawn(report)
    assert report.bundle is not None
    assert report.bundle.memory.folded == 2048, "the bodies need their weights in float32"


def test_a_bundle_with_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "model.onnx").write_bytes(b"\xff" * len(GRAPH))
    with pytest.raises(BundleError, match=r"model\.onnx is not a readable ONNX graph"):
        inspect_path(folder)


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


def test_what_is_drawn_for_a_bundle(tmp_path: Path) -> None:
    text = drawn(inspect_path(write_bundle(tmp_path / "bundle")))
    for words in (
        "19 BF16; linked from the checkpoint",
        "2.00 KiB",
        "1 x 6, 1 x 20 (float32)",
        "RotaryEmbedding",
        "1.5e-07",
        "weights.safetensors",
        "Memory of a session on this machine",
        "5 rows",
        "Native kernels on this machine",
    ):
        assert words in text
    sliding = drawn(inspect_path(write_bundle(tmp_path / "sliding", windows=(3, 4))))
    assert "unbounded, every layer slides" in sliding
    assert "6 tokens exactly, 1 + Σ(W − 1)" in sliding
