"""From checkpoint to bundle: what is written, twice the same, and whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import exporter.compile
import exporter.stitch
import exporter.write
from exporter import export
from exporter.plan import ExportPlan, make_plan
from graph_passes.pipeline import PIPELINE
from reference.checkpoint import open_checkpoint
from reference.weights import bind
from runtime import load
from runtime.errors import BundleError, ContextError, ExportError, FusionError, TraceError
from runtime.rolling_kv import kv_bytes
from tests.support.bundles import checkpoint, exported, shared_traces
from tests.support.checkpoints import load_oracle

STAGES = ("tracing", "fusing", "writing weights", "hashing")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_manifest_describes_the_bundle() -> None:
    case = exported(chunk=3, max_batch=2, tokenizer=True)
    manifest = json.loads((case.bundle / "manifest.json").read_text())
    tokenizer = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert manifest["tokenizer"] == tokenizer
    assert set(manifest["files"]) == {"model.onnx", *tokenizer}
    assert set(manifest["weights"]["files"]) == {"model.safetensors"}
    assert names(case.bundle) == sorted([*manifest["files"], "manifest.json", "model.safetensors"])
    for name, entry in manifest["files"].items():
        content = (case.bundle / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name in tokenizer:
        assert (case.bundle / name).read_bytes() == (case.checkpoint / name).read_bytes()
    parameters = sum(parameter.numel() for parameter in load_oracle(case.checkpoint).parameters())
    assert manifest["model"]["parameters"] == parameters
    assert manifest["provenance"]["checkpoint"] == str(case.checkpoint)
    options = {"weights": "stored", "copy": False, "chunk": 3, "max_batch": 2, "context": None, "prove": True}
    assert manifest["provenance"]["options"].items() >= options.items()
    consumed = {file.name for file in case.checkpoint.iterdir()} - {"generation_config.json"}
    assert set(manifest["provenance"]["files"]) == consumed
    for name, entry in manifest["provenance"]["files"].items():
        content = (case.checkpoint / name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        once_more = hashlib.sha256(bytes.fromhex(sha256)).hexdigest()  # the block hash of a file of one block
        large = name.endswith(".safetensors")
        due = {"sha256": None, "blocks_sha256": once_more} if large else {"sha256": sha256, "blocks_sha256": None}
        assert entry == {"bytes": len(content)} | due, name
    assert {"python", "numpy", "torch", "onnxruntime"} <= manifest["provenance"]["versions"].keys()
    assert manifest["kv"]["max_batch"] == 2
    assert manifest["fusion"]["proved"]
    assert manifest["fusion"]["nodes"].items() >= {"RollingAttention": 2, "RMSNorm": 5}.items()
    assert 0 <= manifest["fusion"]["largest_error"] < 1e-5


def test_capacities_are_those_of_the_plan() -> None:
    case = exported(chunk=3, context=20, architecture="ministral", num_layers=4, layer_windows=[None, 4, 4, None])
    config = case.opened().config
    plan = make_plan(config, chunk=3, context=20)
    kv = load(case.bundle, verify=True, threads=1).manifest.kv
    assert [layer.window for layer in kv.layers] == [None, 4, 4, None]
    assert [layer.capacity for layer in kv.layers] == [plan.capacity(kind) for kind in plan.kind_of_layer]
    assert [layer.capacity for layer in kv.layers] == [20, 6, 6, 20]
    assert kv.context == 20
    expected = kv_bytes([20, 6, 6, 20], batch=1, num_kv_heads=2, head_dim=config.head_dim, dtype="float32")
    assert case.session().kv_bytes == expected


def test_dynamic_rope_may_run_up_to_where_it_begins(tmp_path: Path) -> None:
    source = checkpoint(rope={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=16)
    with shared_traces():
        session = load(export(source, tmp_path / "bundle", chunk=4, prove=False), threads=1)
    assert session.manifest.kv.position_limit == open_checkpoint(source).config.position_limit == 16
    session.forward([1] * 16)
    with pytest.raises(ContextError, match="dynamic RoPE: from position 16"):
        session.forward([1])


def test_progress_is_told_in_order(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    with shared_traces():
        out = export(checkpoint(), tmp_path / "bundle", chunk=4, copy=True, progress=lambda *call: calls.append(call))
    assert out == tmp_path / "bundle"
    assert tuple(dict.fromkeys(stage for stage, _, _ in calls)) == STAGES
    for stage in STAGES:
        steps = [(done, total) for name, done, total in calls if name == stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
        assert len({total for _, total in steps}) == 1


def test_dumped_passes_show_every_step(tmp_path: Path) -> None:
    with shared_traces():
        export(checkpoint(), tmp_path / "bundle", chunk=4, prove=False, dump_passes=tmp_path / "passes")
    dumped = sorted(file for file in (tmp_path / "passes").iterdir() if file.suffix == ".onnx")
    assert [file.name[:2] for file in dumped] == [f"{step:02d}" for step in range(2 + len(PIPELINE))]
    nodes = [len(ir.load(file).graph) for file in dumped]
    assert nodes[0] > nodes[-1]
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert not manifest["fusion"]["proved"]


class Stop(Exception):
    """What the tests below raise in the middle of an export."""


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path, stage: str) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if name == stage and done:
            raise Stop

    with shared_traces(), pytest.raises(Stop):
        export(checkpoint(), tmp_path / "bundle", chunk=4, copy=True, progress=stop)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporter.write, "write_manifest", full)
    with shared_traces(), pytest.raises(ExportError, match=r"Writing .* failed: .*No space left"):
        export(checkpoint(), tmp_path / "bundle", chunk=4)
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from exporter import export

source, whole, killed = sys.argv[1:]

def kill(stage, done, total):
    if stage == "writing weights" and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

export(source, whole, chunk=4, max_batch=4)
export(source, killed, chunk=4, max_batch=4, copy=True, progress=kill)
"""


def test_a_killed_export_leaves_no_bundle_and_two_exports_give_equal_bytes(tmp_path: Path) -> None:
    """Another process, with other addresses and hash seeds, writes the same bytes; then it kills itself half-way."""
    case = exported(chunk=4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    root = Path(exporter.compile.__file__).parents[1]
    command = [sys.executable, "-c", KILLED, *map(str, (case.checkpoint, whole, killed))]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # `case` was made in this process from a shared trace.
    assert contents(whole) == contents(case.bundle)

    assert not killed.exists()
    (left,) = (folder for folder in tmp_path.iterdir() if folder != whole)
    assert left.name.startswith(".killed.partial-")
    assert names(left) == ["model.onnx", "weights.safetensors"]
    with pytest.raises(BundleError):
        load(left)
    with shared_traces():
        export(case.checkpoint, killed, chunk=4)  # what was left is cleared away
    assert names(tmp_path) == ["killed", "whole"]
    assert load(killed, verify=True, threads=1).forward([1, 2, 3]).shape == (1, 3, 64)


def test_a_fusion_that_fires_too_rarely_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    due = exporter.compile.expected_fusions
    monkeypatch.setattr(
        exporter.compile, "expected_fusions", lambda plan, layers: due(plan, layers) | {"rope": 2 * layers + 1}
    )
    with shared_traces(), pytest.raises(FusionError, match="'rope' fired 2 times in the traced template where 3"):
        export(checkpoint(), tmp_path / "bundle", chunk=4)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("window", r"windows \(6, 5\) and the checkpoint says \(5, 5\)"),
        ("count", "holds 1 nodes of RotaryEmbedding where 0"),
        ("rings", r"layer 0 reads and writes the rings past\.0\.value, past\.0\.key, present\.0\.key"),
    ],
)
def test_a_stitched_model_that_breaks_the_contract_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    def spoil(template: ir.Model, plan: ExportPlan) -> ir.Model:
        model = exporter.stitch.stitch(template, plan)
        node = next(node for node in model.graph if node.op_type == "RollingAttention")
        if fault == "window":
            node.attributes["window"] = ir.AttrInt64("window", 6)
        elif fault == "rings":
            key, value = node.inputs[5:7]
            node.replace_input_with(5, value)
            node.replace_input_with(6, key)
        else:
            node.op_type = "RotaryEmbedding"
        return model

    monkeypatch.setattr(exporter.compile, "stitch", spoil)
    with shared_traces(), pytest.raises(FusionError, match=words):
        export(checkpoint(), tmp_path / "bundle", chunk=4)
    assert names(tmp_path) == []


def test_a_parameter_that_the_graph_does_not_use_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        exporter.compile, "bind", lambda opened: {k: v for k, v in bind(opened).items() if k != "norm.weight"}
    )
    with shared_traces(), pytest.raises(TraceError, match=r"do not have the same parameters; 1 differ"):
        export(checkpoint(), tmp_path / "bundle", chunk=4)
    assert names(tmp_path) == []


def test_expected_fusions_follow_from_the_architecture() -> None:
    def expected(**settings: Any) -> dict[str, int]:
        plan = make_plan(open_checkpoint(checkpoint(**settings)).config, chunk=4)
        return exporter.compile.expected_fusions(plan, plan.config.num_layers)

    both = {"rope": 6, "rolling_kv": 6, "gqa": 3, "sliding_window": 3, "rolling_attention": 3, "rms_norm": 7}
    assert expected(num_layers=3) == both | {"gated_activation": 3, "linear": 22}
    normed = both | {"rms_norm": 13, "gated_activation": 3, "linear": 22}  # queries and keys as well
    assert expected(num_layers=3, architecture="qwen3") == normed
    assert expected(num_layers=3, architecture="mixtral") == both | {"moe_gate": 3, "moe": 3, "linear": 16}
