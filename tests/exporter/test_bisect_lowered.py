"""Faults in lowered bundles: weights of two bytes, quantised ones, rings of float16 and int8, and native kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import exporter.bisect.local
import exporter.bisect.stages
import exporter.bisect.write
from exporter.bisect.rings import store_rings
from exporter.bisect.search import bisect
from exporter.bisect.widen import read_as_quantized
from exporter.taps import open_session
from graph_passes.lower.formats import Quantized
from graph_passes.region import IR_VERSION
from graph_passes.unbound import UnboundWeight
from reference.quantized_layout import QuantizedFormat, QuantizedRows, dequantize
from reference.rounding import round_half, round_vectors
from runtime.kernels import kernels
from tests.support import bundles
from tests.support.bundles import Exported, exported
from tests.support.planted import attribute, body_node, planted, with_weights

DENSE: dict[str, Any] = {"seed": 3, "dtype": "bfloat16"}
MIXTURE: dict[str, Any] = {"architecture": "mixtral", "dtype": "bfloat16"}
QWEN: dict[str, Any] = {"architecture": "qwen3", "attention_bias": True, "tie": True, "dtype": "float16"}

INTACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: checkpoint, options of the export
    "bfloat16": (DENSE, {}),
    "float16, tied": (QWEN, {}),
    "rings of float16": (DENSE, {"kv": "float16"}),
    "rings of int8": (QWEN, {"kv": "int8"}),
    "int4": (DENSE, {"weights": "int4"}),
    "int8, tied, biases": (QWEN, {"weights": "int8", "kv": "int8", "block_size": 128}),
    "int4, experts": (MIXTURE, {"weights": "int4", "zero_points": True, "block_size": 16}),
    "int4 and int8, rounded to nearest": (
        DENSE,
        {"weights": "int4", "quantizer": "rtn", "scales": "float32", "keep": ("lm_head=int8", "first")},
    ),
}


@pytest.fixture(autouse=True)
def shared_traces() -> Iterator[None]:
    with mock.patch.object(exporter.bisect.stages, "trace_template", bundles.trace_once), bundles.shared_traces():
        yield


def case_of(name: str) -> Exported:
    settings, options = INTACT[name]
    return exported(options=options, **settings)


@pytest.mark.parametrize("name", INTACT)
def test_an_intact_bundle_has_no_culprit(tmp_path: Path, name: str) -> None:
    report = bisect(case_of(name).bundle, None, tmp_path / "out")
    assert report.healthy, report.culprit
    assert report.nodes > 40


@pytest.mark.parametrize(
    ("name", "tensor", "op"),
    [
        ("bfloat16", "layers.1.mlp.up_proj.weight", "StoredMatMul"),
        ("float16, tied", "embed_tokens.weight", "Cast"),
        ("int4", "layers.1.mlp.up_proj.weight.packed", "QuantizedMatMul"),
        ("int4", "layers.0.self_attn.q_proj.weight.scale", "QuantizedMatMul"),
        ("int8, tied, biases", "lm_head.weight.packed", "QuantizedMatMul"),
        ("int8, tied, biases", "layers.1.self_attn.k_proj.bias", "Add"),
        ("int4, experts", "layers.1.moe.down_proj.packed", "QuantizedMixtureOfExperts"),
        ("int4, experts", "layers.0.moe.gate_proj.zero", "QuantizedMixtureOfExperts"),
    ],
)
def test_a_changed_weight_is_named(tmp_path: Path, name: str, tensor: str, op: str) -> None:
    """However little it moves: one number of a block by one."""
    case = case_of(name)
    by = 1.0 if tensor.endswith((".packed", ".zero")) else 0.25
    report = bisect(with_weights(case.bundle, tmp_path / "wrong", tensor, [5], by), case.checkpoint, tmp_path / "out")
    assert report.culprit is not None
    parameter = tensor.removesuffix(".packed").removesuffix(".scale").removesuffix(".zero")
    assert (report.culprit.kind, report.culprit.weight, report.culprit.op) == ("weight", parameter, op)
    (difference,) = report.weights
    assert 0 < difference.elements <= 32
    assert report.confirmed


def narrower(model: onnx.ModelProto) -> None:
    (op,) = {node.op_type for node in model.graph.node if node.op_type.startswith("RollingAttention")}
    attribute(model, op, "window", 1).i -= 1


@pytest.mark.parametrize("name", ["rings of float16", "rings of int8", "int8, tied, biases", "int4, experts"])
def test_a_changed_window_is_named(tmp_path: Path, name: str) -> None:
    case = case_of(name)
    report = bisect(planted(case.bundle, tmp_path / "wrong", narrower), case.checkpoint, tmp_path / "out")
    assert report.culprit is not None
    assert report.culprit.op.startswith("RollingAttention")
    assert (report.culprit.kind, report.culprit.layer, report.culprit.reproduced) == ("node", 1, False)
    assert "its window is 5 where the bundle has 4" in report.culprit.why
    assert report.confirmed


def without_zero_points(model: onnx.ModelProto) -> None:
    """The body adds no experts' zero points any more."""
    for function in model.functions:
        if function.name == "QuantizedMixtureOfExperts":
            for node in function.node:
                if node.op_type == "MatMulNBits":
                    del node.input[3:]


def scales_of_the_keys(model: onnx.ModelProto) -> None:
    """The body of RollingAttentionInt8 reads values with the scales of keys."""
    body = next(body for body in model.functions if body.name == "RollingAttentionInt8")
    node = next(node for node in body.node if node.output[0] == "held_value")
    node.input[1] = node.input[1].replace("value", "key")


def rounded_down(model: onnx.ModelProto) -> None:
    """Off by one number of 127 at most, which another kernel may be as well."""
    body = next(body for body in model.functions if body.name == "RollingAttentionInt8")
    next(node for node in body.node if node.op_type == "Round").op_type = "Floor"


@pytest.mark.parametrize(
    ("name", "fault", "op"),
    [
        ("int4, experts", without_zero_points, "QuantizedMixtureOfExperts"),
        ("rings of int8", scales_of_the_keys, "RollingAttentionInt8"),
        ("rings of int8", rounded_down, "RollingAttentionInt8"),
    ],
)
def test_a_changed_body_is_named(tmp_path: Path, name: str, fault: Any, op: str) -> None:
    """Also where sessions run native kernels and never see it: other engines run the bodies."""
    case = case_of(name)
    report = bisect(planted(case.bundle, tmp_path / "wrong", fault), case.checkpoint, tmp_path / "out")
    assert report.culprit is not None
    assert (report.culprit.op, report.culprit.kind, report.culprit.reproduced) == (op, "node", False)
    assert f"its function body of {op} is another" in report.culprit.why
    assert report.confirmed


def squared_by_a_product(model: onnx.ModelProto) -> None:
    """x·x in the place of x²."""
    node = body_node(model, "RMSNorm", "Pow")
    node.op_type, node.input[1] = "Mul", node.input[0]


def test_a_body_that_computes_the_same_otherwise_is_no_culprit(tmp_path: Path) -> None:
    """x·x and x² are the same bits."""
    case = case_of("bfloat16")
    report = bisect(planted(case.bundle, tmp_path / "other", squared_by_a_product), case.checkpoint, tmp_path / "out")
    assert report.healthy


@pytest.mark.parametrize("name", ["bfloat16", "rings of int8"])
def test_a_wrong_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A kernel that scales otherwise, played by another scale in the graph wherever kernels would run."""
    if kernels() is None:
        monkeypatch.setattr("exporter.bisect.search.kernels", lambda: object())

    def spoilt(model: ir.Model) -> ir.Model:
        copy = model.clone()
        for node in copy.graph:
            if node.op_type.startswith("RollingAttention"):
                node.attributes["scale"] = ir.AttrFloat32("scale", 2 * node.attributes["scale"].as_float())
        return copy

    def with_a_wrong_kernel(model: ir.Model, *arguments: Any, native: bool, **more: Any) -> ort.InferenceSession:
        return open_session(spoilt(model) if native else model, *arguments, native=native, **more)

    def alone(path: Path) -> ort.InferenceSession:
        return ort.InferenceSession(ir.to_proto(spoilt(ir.load(path))).SerializeToString())

    monkeypatch.setattr(exporter.bisect.local, "open_session", with_a_wrong_kernel)
    monkeypatch.setattr(exporter.bisect.write, "_native_session", alone)
    case = case_of(name)
    report = bisect(case.bundle, None, tmp_path / "out")
    assert report.culprit is not None
    assert (report.culprit.kind, report.culprit.stage, report.culprit.layer) == ("kernel", None, 0)
    assert report.culprit.op.startswith("RollingAttention")
    assert "CIERZO_KERNELS=off" in report.culprit.why
    assert report.confirmed
    assert "register_custom_ops_library" in (tmp_path / "out" / "README.txt").read_text()


def test_rings_are_stored_as_the_definition_says() -> None:
    """A graph that adds to a ring and reads it: what it reads is what it stored, and storing twice changes nothing."""
    rng = np.random.default_rng(0)
    new = rng.standard_normal((2, 1, 3, 4)).astype(np.float32)
    new[0, 0, 1] = 0
    for kv, rounded in (("float16", round_half), ("int8", round_vectors)):
        session = ort.InferenceSession(ir.to_proto(adding_graph(kv)).SerializeToString())
        feeds: dict[str, Any] = {"new": new, "past.0.key": np.zeros(new.shape, kv)}
        if kv == "int8":
            feeds["past.0.key.scale"] = np.zeros(new.shape[:3], np.float32)
        names = [output.name for output in session.get_outputs()]
        first = dict(zip(names, session.run(None, feeds), strict=True))
        assert first["present.0.key"].dtype == np.dtype(kv)
        np.testing.assert_array_equal(first["read"], rounded(torch.from_numpy(new)).numpy())
        again = feeds | {"new": np.zeros_like(new)} | {f"past{n[7:]}": a for n, a in first.items() if n != "read"}
        second = dict(zip(names, session.run(None, again), strict=True))
        np.testing.assert_array_equal(second["present.0.key"], first["present.0.key"])
        np.testing.assert_allclose(second["read"], first["read"], rtol=1e-6)


def adding_graph(kv: str) -> ir.Model:
    def value(name: str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", 1, 3, 4]))

    new, past, present, read = (value(name) for name in ("new", "past.0.key", "present.0.key", "read"))
    nodes = [ir.node("Add", [past, new], outputs=[present]), ir.node("Identity", [present], outputs=[read])]
    graph = ir.Graph([new, past], [read, present], nodes=nodes, opset_imports={"": 24}, name="rings")
    model = ir.Model(graph, ir_version=IR_VERSION)
    store_rings(model, kv)
    return model


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_widened_as_their_layout_says(bits: int, zero_points: bool) -> None:
    """A stack of matrices whose last block is a part of one."""
    layout = QuantizedFormat(bits, 16, zero_points, "F16")
    rng, shape = np.random.default_rng(bits), (2, 3, 40)
    blocks = layout.blocks(shape[-1])
    arrays: list[Any] = [
        rng.integers(0, 256, (2, 3, blocks, layout.block_bytes), dtype=np.uint8),
        rng.random((2, 3, blocks)).astype(np.float16),
        rng.integers(0, 256, (2, 3, layout.zero_bytes(shape[-1])), dtype=np.uint8),
    ][: 3 if zero_points else 2]
    kind, size = ir.DataType.FLOAT, ir.Shape(shape)
    weight = ir.Value(name="w", type=ir.TensorType(kind), shape=size, const_value=UnboundWeight("w", kind, size))
    out = ir.Value(name="out", type=ir.TensorType(kind), shape=size)
    reader = ir.node("Identity", [weight], outputs=[out])
    graph = ir.Graph([], [out], nodes=[reader], initializers=[weight], opset_imports={"": 24}, name="widened")
    model = ir.Model(graph, ir_version=IR_VERSION)
    parts = []
    for name, array in zip(("packed", "scale", "zero"), arrays, strict=False):
        tensor = ir.tensor(array, name=name)
        parts.append(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        )
    read_as_quantized(model, weight, parts, Quantized(bits, 16, zero_points, "F16"), reader)
    (got,) = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {})
    packed, scale, *zero = (torch.from_numpy(array).flatten(0, 1) for array in arrays)
    rows = QuantizedRows(packed, scale, zero[0] if zero else None)
    want = dequantize(rows, layout, shape[-1], torch.float32).view(shape).numpy()
    np.testing.assert_array_equal(got, want)
