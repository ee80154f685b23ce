"""Every planted fault is located to its exact node, and the model that is written fails when run on its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import exporter.bisect.stages
import exporter.compile
from exporter.bisect.report import BisectReport, Culprit
from exporter.bisect.search import bisect
from exporter.stitch import stitch
from graph_passes.canonical import canonicalise
from graph_passes.driver_types import Match
from runtime.errors import BundleError, CheckpointError, ExportError, TraceError
from tests.support import bundles
from tests.support.bundles import Exported, exported
from tests.support.checkpoints import make_checkpoint
from tests.support.graph_faults import (
    body_with_another_window,
    epsilon,
    frequencies,
    keys_from_the_ring_of_values,
    one_node_more,
    renamed_with_a_narrower_window,
    scale_of_layer_2,
    slots_that_do_not_wrap,
    smallest_frequency,
)
from tests.support.pass_faults import interleaved, planted_pass, wider
from tests.support.planted import attribute, planted, with_weights

Change = Callable[[onnx.ModelProto], None]
ATTENTION = "layers.{}.node_softmax__GroupedQueryAttention__SlidingWindowAttention__RollingAttention"


@pytest.fixture(scope="module")
def dense() -> Exported:
    return exported(num_layers=4, seed=3)


@pytest.fixture(scope="module")
def mixture() -> Exported:
    return exported(num_layers=2, architecture="mixtral")


@pytest.fixture(autouse=True)
def shared_traces() -> Iterator[None]:
    with mock.patch.object(exporter.bisect.stages, "trace_template", bundles.trace_once), bundles.shared_traces():
        yield


def culprit_of(report: BisectReport) -> Culprit:
    assert report.culprit is not None
    return report.culprit


def differs_alone(folder: Path) -> bool:
    """Whether culprit.onnx in plain ONNX Runtime misses expected.npz; it must give got.npz in any case."""
    session = onnxruntime.InferenceSession(folder / "culprit.onnx", providers=["CPUExecutionProvider"])
    inputs, due, bundle = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "expected", "got"))
    (name,) = due
    (got,) = session.run([name], inputs)
    np.testing.assert_allclose(got, bundle[name], rtol=1e-5, atol=1e-5)
    gap = np.abs(got.astype(np.float64) - due[name]).max()
    return bool(gap > json.loads((folder / "report.json").read_text())["tolerance"])


def assert_written(report: BisectReport, folder: Path, nodes: int = 1) -> None:
    names = {"culprit.onnx", "inputs.npz", "expected.npz", "got.npz", "report.json", "README.txt"}
    assert names <= {path.name for path in folder.iterdir()}
    assert len((folder / "README.txt").read_text().splitlines()) == 2
    assert report.confirmed
    assert differs_alone(folder)
    assert report.nodes_written == len(onnx.load(folder / "culprit.onnx").graph.node) == nodes
    written = json.loads((folder / "report.json").read_text())
    assert {key: written[key] for key in report.to_json()} == report.to_json()


def test_a_right_bundle_has_no_culprit(dense: Exported, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = bisect(dense.bundle, None, tmp_path / "out", progress=lambda _, done, total: seen.append((done, total)))
    assert report.healthy
    assert report.nodes > 4 * 20
    assert not (tmp_path / "out").exists()
    assert seen[0] == (0, 5)
    assert seen[-1] == (5, 5)


def test_a_right_mixture_of_experts_has_no_culprit(mixture: Exported, tmp_path: Path) -> None:
    assert bisect(mixture.bundle, None, tmp_path / "out").healthy


def test_a_few_wrong_elements_of_a_weight(dense: Exported, tmp_path: Path) -> None:
    parameter = "layers.2.self_attn.o_proj.weight"
    wrong = with_weights(dense.bundle, tmp_path / "wrong", parameter, [5, 17, 300], 0.5)
    report = bisect(wrong, dense.checkpoint, tmp_path / "out")
    culprit = culprit_of(report)
    assert (culprit.kind, culprit.weight, culprit.layer) == ("weight", parameter, 2)
    assert (culprit.op, culprit.module) == ("StoredMatMul", "layers.2.self_attn.o_proj")
    assert culprit.stage is None
    (difference,) = report.weights
    assert (difference.elements, difference.first) == (3, 5)
    assert difference.largest == pytest.approx(0.5, rel=1e-5)
    assert "3 of 1,024 elements" in culprit.why
    assert_written(report, tmp_path / "out")


@pytest.mark.parametrize(
    ("parameter", "element", "by"),
    [
        ("embed_tokens.weight", 32 * 50 + 3, 1.0),  # of one token, which a random row need not hold
        ("layers.1.mlp.up_proj.weight", 7, 1e-6),  # far below what the budget would see
        ("layers.3.input_layernorm.weight", 1, float("nan")),
    ],
)
def test_weights_that_hardly_show(dense: Exported, tmp_path: Path, parameter: str, element: int, by: float) -> None:
    wrong = with_weights(dense.bundle, tmp_path / "wrong", parameter, [element], by)
    report = bisect(wrong, dense.checkpoint, tmp_path / "out")
    assert (culprit_of(report).kind, culprit_of(report).weight) == ("weight", parameter)
    assert report.confirmed
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "change", "op", "value", "said"),
    [
        ("sliding_window", wider, "RollingAttention", "layers.0.transpose_4", "its window is 5 where .* has 6"),
        ("rope", interleaved, "RollingAttention", "layers.0.transpose_4", "its interleaved is 0 where .* has 1"),
    ],
)
def test_a_wrong_pass(
    dense: Exported, tmp_path: Path, name: str, change: Callable[[Match], Match], op: str, value: str, said: str
) -> None:
    wrong = tmp_path / "wrong"
    with planted_pass(name, change), mock.patch.object(exporter.compile, "_check_nodes"):
        exporter.compile.export(dense.checkpoint, wrong, chunk=4, prove=False)
        report = bisect(wrong, None, tmp_path / "out")
    culprit = culprit_of(report)
    assert (culprit.kind, culprit.stage, culprit.reproduced) == ("pass", name, True)
    assert (culprit.op, culprit.value, culprit.layer) == (op, value, 0)
    assert len(culprit.others) == (3 if name == "sliding_window" else 7), "the same fault in the other layers"
    assert_written(report, tmp_path / "out")

    mended = culprit_of(bisect(wrong, None, tmp_path / "later"))
    assert (mended.kind, mended.stage, mended.reproduced) == ("node", "rolling_attention", False)
    assert (mended.node, mended.value) == (culprit.node, value)
    assert re.search(said, mended.why)


GRAPHS: dict[str, tuple[Change, dict[str, Any], str]] = {
    "scale": (
        scale_of_layer_2,
        {"kind": "node", "stage": "rolling_attention", "layer": 2, "node": ATTENTION.format(2)},
        "its scale is 0.35355.* where the bundle has 0.35390",
    ),
    "ring of another kind": (
        keys_from_the_ring_of_values,
        {
            "stage": "rolling_attention",
            "layer": 1,
            "value": "layers.1.transpose_4",
            "step": 1,
            "op": "RollingAttention",
        },
        "its inputs there are .*, past.1.key, past.1.value, .* where .* past.1.value, past.1.value",
    ),
    "slots that do not wrap": (
        slots_that_do_not_wrap,
        {"stage": "rolling_attention", "layer": 0, "node": ATTENTION.format(0), "step": 2},
        "its function body of RollingKVWrite is another",
    ),
    "window in the body": (
        body_with_another_window,
        {"stage": "rolling_attention", "layer": 0, "node": ATTENTION.format(0)},
        "its function body of SlidingWindowAttention is another",
    ),
    "frequencies": (
        frequencies,
        {"kind": "constant", "stage": None, "layer": None, "weight": "rotary.inverse_frequency_d", "op": "Mul"},
        "is not the one that this version makes",
    ),
    "one node more": (
        one_node_more,
        {"kind": "node", "stage": None, "layer": 2, "node": "one_more", "op": "Mul"},
        "it has StoredMatMul there where the bundle has Mul",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_was_changed(dense: Exported, tmp_path: Path, name: str) -> None:
    change, due, said = GRAPHS[name]
    report = bisect(planted(dense.bundle, tmp_path / "wrong", change), dense.checkpoint, tmp_path / "out")
    culprit = culprit_of(report)
    assert {key: getattr(culprit, key) for key in due} == due
    assert not culprit.reproduced
    assert re.search(said, culprit.why), culprit.why
    # Golden does not know the value between the two, so they cannot be told apart by their numbers.
    assert_written(report, tmp_path / "out", nodes=2 if name == "one node more" else 1)


@pytest.mark.parametrize("change", [smallest_frequency, epsilon])
def test_a_constant_that_hardly_shows(dense: Exported, tmp_path: Path, change: Change) -> None:
    """Neither moves a value by more than rounding would; as with weights, that is no excuse."""
    report = bisect(planted(dense.bundle, tmp_path / "wrong", change), dense.checkpoint, tmp_path / "out")
    culprit = culprit_of(report)
    assert (culprit.kind, culprit.op) == (("constant", "Mul") if change is smallest_frequency else ("node", "RMSNorm"))
    assert_written(report, tmp_path / "out")


def test_a_graph_with_other_names(dense: Exported, tmp_path: Path) -> None:
    wrong = planted(dense.bundle, tmp_path / "wrong", renamed_with_a_narrower_window)
    report = bisect(wrong, dense.checkpoint, tmp_path / "out")
    culprit = culprit_of(report)
    assert (culprit.node, culprit.layer, culprit.stage) == (ATTENTION.format(2), 2, "rolling_attention")
    assert "its window is 5 where the bundle has 4" in culprit.why
    assert report.confirmed


def test_a_template_whose_layers_hang_together_only_later(dense: Exported, tmp_path: Path) -> None:
    """Golden is then the graph after two passes, and a fault in one of those is found in the template."""
    calls: list[int] = []
    whole = stitch

    def late(*arguments: Any) -> ir.Model:
        calls.append(1)
        if len(calls) <= 2:
            raise TraceError("two hidden states")
        return whole(*arguments)

    with mock.patch("exporter.bisect.stages.stitch", late):
        assert bisect(dense.bundle, None, tmp_path / "out").healthy
        calls.clear()
        with planted_pass("rope", interleaved):
            culprit = culprit_of(bisect(dense.bundle, None, tmp_path / "out"))
    assert (culprit.kind, culprit.stage, culprit.op) == ("pass", "rope", "RotaryEmbedding")


def test_the_gate_of_a_mixture_of_experts(mixture: Exported, tmp_path: Path) -> None:
    def fewer(model: onnx.ModelProto) -> None:
        attribute(model, "MoEGate", "top_k", 1).i = 1

    report = bisect(planted(mixture.bundle, tmp_path / "wrong", fewer), mixture.checkpoint, tmp_path / "out")
    culprit = culprit_of(report)
    assert (culprit.op, culprit.layer, culprit.stage, culprit.reproduced) == ("MoEGate", 1, "moe_gate", False)
    assert "its top_k is 2 where the bundle has 1" in culprit.why
    assert report.confirmed
    assert report.nodes_written == 1


def test_canonicalisation_that_changes_the_function(dense: Exported, tmp_path: Path) -> None:
    def wrong(model: ir.Model) -> None:
        canonicalise(model)
        difference = next(node for node in model.graph if node.op_type == "Sub")
        difference.replace_input_with(1, difference.inputs[0])

    with mock.patch.object(exporter.bisect.stages, "canonicalise", wrong):
        report = bisect(dense.bundle, None, tmp_path / "out")
    culprit = culprit_of(report)
    assert (culprit.kind, culprit.stage, culprit.op) == ("tracer", "canonicalise", "Sub")
    assert_written(report, tmp_path / "out")


def test_a_trace_that_is_not_the_reference(dense: Exported, tmp_path: Path) -> None:
    def wrong(*arguments: Any) -> ir.Model:
        model = bundles.trace_once(*arguments)
        root = next(node for node in model.graph if node.op_type == "Sqrt")
        squared = root.inputs[0]
        for use in list(root.outputs[0].uses()):
            use.node.replace_input_with(use.idx, squared)
        return model

    with mock.patch.object(exporter.bisect.stages, "trace_template", wrong):
        report = bisect(dense.bundle, None, tmp_path / "out")
    culprit = culprit_of(report)
    assert (culprit.kind, culprit.stage) == ("tracer", "trace")
    assert culprit.module == "layers.0.input_layernorm"
    assert report.confirmed
    assert 1 < report.nodes_written < 12


def test_the_readme_works_as_written(dense: Exported, tmp_path: Path) -> None:
    wrong = planted(dense.bundle, tmp_path / "wrong", scale_of_layer_2)
    bisect(wrong, dense.checkpoint, tmp_path / "out")
    command = (tmp_path / "out" / "README.txt").read_text().splitlines()[0]
    assert command.startswith("polygraphy run culprit.onnx ")
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(command.split(), cwd=tmp_path / "out", env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Pass Rate: 0.00%" in done.stdout + done.stderr


def test_rings_that_no_graph_of_the_checkpoint_can_take(dense: Exported, tmp_path: Path) -> None:
    def widen(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if ".key" in value.name or ".value" in value.name:
                value.type.tensor_type.shape.dim[2].dim_value = 64
        del model.graph.value_info[:]

    wide = planted(dense.bundle, tmp_path / "wide", widen)
    manifest = json.loads((wide / "manifest.json").read_text())
    for layer in manifest["kv"]["layers"]:
        layer |= {"window": 61, "capacity": 64}
    (wide / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="layer 0 has 64 slots in the bundle and 8 by the checkpoint"):
        bisect(wide, dense.checkpoint, tmp_path / "out")


def test_what_cannot_be_bisected_is_refused(dense: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exists already"):
        bisect(dense.bundle, None, tmp_path)
    other = make_checkpoint(tmp_path / "other", num_layers=3)
    with pytest.raises(CheckpointError, match="not the same model"):
        bisect(dense.bundle, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
