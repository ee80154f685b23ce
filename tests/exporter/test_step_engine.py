"""Engines of graphs for ONNX Runtime on CUDA: what is written, what is refused, and what `cierzo inspect` shows."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import exporter
from exporter.build import step_engine
from exporter.build.build import KINDS, build
from exporter.build.cuda_provider import VERSION
from exporter.build.step_engine import BuiltSteps
from exporter.build.step_graphs import NOWHERE
from exporter.compile import export
from exporter.defaults import ENGINE_BACKENDS, LOWERING
from runtime.bundle import Bundle, read_bundle
from runtime.engine_files import read_engine_document
from runtime.engine_info import DECODE, INPUT, PREFILL
from runtime.errors import BackendError, BundleError
from runtime.hashing import sha256_of
from runtime.onnxruntime_cuda.provider import PACKAGE
from runtime.step_engine_info import BOUNDS, CONSTANT, GRAPHS, PAGE, parse_step_engine
from runtime.weight_expression import pieces
from tests.support.built_steps import BACKEND, CHUNK, ROWS, WINDOW, built, bundle_of
from tests.support.bundles import exported, shared_traces
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> BuiltSteps:
    return built(bundle_of("window", tmp_path_factory.mktemp("window") / "bundle"))


def opened(engine: BuiltSteps) -> Bundle:
    return read_bundle(engine.folder.parents[1], verify=True)


def test_what_is_built_for_is_what_users_are_told_to_install() -> None:
    assert f"onnxruntime-gpu=={VERSION}.*" == PACKAGE


def test_the_table_of_kinds_is_the_commands() -> None:
    assert tuple(KINDS) == ENGINE_BACKENDS


def test_an_engine_says_what_it_was_built_as(windowed: BuiltSteps) -> None:
    info, bundle = windowed.info, opened(windowed)
    assert (info.backend, info.version, info.arithmetic, info.kv) == (BACKEND, VERSION, "bfloat16", "bfloat16")
    assert (info.max_batch, info.chunk) == (ROWS, CHUNK)
    assert info.graph_sha256 == sha256_of(bundle.file("model.onnx"))
    assert info.name.startswith(f"onnxruntime-{VERSION}-bfloat16-")
    assert [(ring.slots, ring.window) for ring in info.rings] == [(WINDOW, WINDOW)] * 2
    assert [ring.past_key for ring in info.rings] == [layer.past_key for layer in bundle.manifest.kv.layers]
    assert info.scratch is not None
    assert (info.scratch.slots, len(info.scratch.keys), len(info.scratch.values)) == (PAGE, 4, 4)


def test_rings_without_a_window_hold_the_context_and_a_chunk(tmp_path: Path) -> None:
    info = built(bundle_of("no window", tmp_path / "bundle")).info
    assert {(ring.slots, ring.window) for ring in info.rings} == {(40 + CHUNK, None)}
    assert info.scratch is None


def test_what_is_written_is_what_the_manifest_lists(windowed: BuiltSteps) -> None:
    bundle, info = opened(windowed), windowed.info
    document = read_engine_document(bundle, info.name)
    assert document.backend == BACKEND
    assert parse_step_engine(document.name, document.root) == info
    assert {path.name for path in windowed.folder.iterdir()} == {"engine.json", *(f"{name}.onnx" for name in GRAPHS)}
    assert os.stat(windowed.folder).st_mode & 0o777 == 0o755
    for graph in info.graphs.values():
        assert graph.bytes == (windowed.folder / graph.file).stat().st_size
        assert graph.sha256 == sha256_of(windowed.folder / graph.file)


@pytest.mark.parametrize("model", ["window", "mixtral", "int4 mixtral"])
def test_graphs_hold_no_weight_and_ask_for_the_same_ones(tmp_path: Path, model: str) -> None:
    engine = built(bundle_of(model, tmp_path / "bundle"))
    bundle, info = opened(engine), engine.info
    graph, layers = bundle.manifest.graph, bundle.manifest.kv.layers
    rings = {name for layer in layers for name in (layer.past_key, layer.past_value)}
    own = {
        PREFILL: {graph.input_ids, graph.start_positions, graph.token_counts, graph.logit_positions, BOUNDS} | rings,
        DECODE: {graph.input_ids, graph.start_positions} | rings,
    }
    weights = {weight.name: weight for weight in info.tensors}
    assert {weight.role for weight in info.tensors} == ({INPUT, CONSTANT} if model == "int4 mixtral" else {INPUT})
    for name, inputs in own.items():
        onnx_graph = onnx.load(engine.folder / info.graphs[name].file, load_external_data=False).graph
        constants = {tensor.name for tensor in onnx_graph.initializer if tensor.external_data}
        assert constants == {weight.name for weight in info.tensors if weight.role == CONSTANT}
        locations = {entry.value for t in onnx_graph.initializer for entry in t.external_data}
        assert locations <= {NOWHERE}
        asked = {value.name: value for value in onnx_graph.input}
        assert asked.keys() == inputs | (weights.keys() - constants)
        for value in asked.keys() & weights.keys():
            shape = asked[value].type.tensor_type.shape
            assert tuple(extent.dim_value for extent in shape.dim) == weights[value].shape
        assert sum(int(np.prod(t.dims)) for t in onnx_graph.initializer if not t.external_data) < 2000
        assert not onnx.load(engine.folder / info.graphs[name].file, load_external_data=False).functions


def test_weights_are_what_the_bundle_stores(tmp_path: Path) -> None:
    """Experts' gate and up as one: of each expert in turn, a row of gate and a row of up in turn."""
    engine = built(bundle_of("mixtral", tmp_path / "bundle"))
    bundle, info = opened(engine), engine.info
    stored = load_file(bundle.file("model.safetensors"))
    experts = "model.layers.0.block_sparse_moe.experts"
    (fused,) = [weight for weight in info.tensors if weight.shape == (4, 2 * 48, 32) and ".0." in weight.name]
    data = np.concatenate(list(pieces(fused.expression, bundle.file, info.orders))).view(np.uint16)
    gate, up = ([stored[f"{experts}.{expert}.{matrix}.weight"] for expert in range(4)] for matrix in ("w1", "w3"))
    want = torch.stack([torch.stack(gate), torch.stack(up)], dim=2)
    np.testing.assert_array_equal(data, want.view(torch.uint16).numpy().reshape(-1))


def test_engines_lie_side_by_side_and_the_same_one_is_replaced(tmp_path: Path) -> None:
    bundle = bundle_of("window", tmp_path / "bundle")
    told: list[tuple[str, int, int]] = []
    first = exporter.build_engine(bundle.path, backend=BACKEND, progress=lambda *report: told.append(report))
    second = exporter.build_engine(bundle.path, backend=BACKEND, arithmetic="float16")
    (first / "left").touch()
    contents = {path.name: path.read_bytes() for path in first.iterdir() if path.name != "left"}
    assert exporter.build_engine(bundle.path, backend=BACKEND, arithmetic="bfloat16") == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == contents
    assert set(read_bundle(bundle.path).manifest.engines) == {first.name, second.name}
    assert told == [(LOWERING, done, len(GRAPHS)) for done in range(len(GRAPHS) + 1)]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of("window", tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise BackendError("no")

    for stage in ("placement", "_info"):
        with monkeypatch.context() as patch:
            patch.setattr(step_engine, stage, fail)
            with pytest.raises(BackendError, match=r"^no$"):
                build(bundle.path, backend=BACKEND)
        assert {path.name: path.read_bytes() for path in bundle.path.iterdir()} == before


@pytest.mark.parametrize(
    "option",
    [
        {"flavor": "tensorrt"},
        {"compute_capability": "9.0"},
        {"kv": "bfloat16"},
        {"plugins": "none"},
        {"weights": "weightless"},
    ],
    ids=str,
)
def test_options_that_these_engines_do_not_have_are_refused(windowed: BuiltSteps, option: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=r"have no --.*only --arithmetic\. Leave it out") as caught:
        build(windowed.folder.parents[1], backend=BACKEND, **option)
    assert f"--{next(iter(option)).replace('_', '-')}" in str(caught.value)


def test_float32_is_refused_asked_for_or_not(windowed: BuiltSteps) -> None:
    with pytest.raises(BackendError, match=r"bfloat16 or float16.*float32 is asked for.*--arithmetic"):
        build(windowed.folder.parents[1], backend=BACKEND, arithmetic="float32")
    with pytest.raises(BackendError, match=r"float32 is that of most weights of .*--arithmetic"):
        build(exported(chunk=CHUNK, window=WINDOW, dtype="float32").bundle, backend=BACKEND)


def test_bundles_that_cannot_be_computed_so_are_refused() -> None:
    options = {"weights": "int4", "block_size": 16}
    with pytest.raises(BackendError, match=r"float16 scales.*not in bfloat16"):
        build(exported(dtype="bfloat16", options=options).bundle, backend=BACKEND, arithmetic="bfloat16")
    with pytest.raises(BackendError, match="int8 KV buffers"):
        build(exported(dtype="bfloat16", options={"kv": "int8"}).bundle, backend=BACKEND)
    with pytest.raises(BackendError, match="There is no backend that engines are built for 'onnxruntime'"):
        build(exported(dtype="bfloat16").bundle, backend="onnxruntime")


def test_rings_that_kernels_cannot_count_are_refused(windowed: BuiltSteps) -> None:
    """The scratch memory is the largest here: 256 slots of 2 heads of 8 numbers, for each row."""
    bundle = read_bundle(windowed.folder.parents[1])
    most = (2**31 - 1) // (PAGE * 16)
    for rows in (most, most + 1):
        kv = replace(bundle.manifest.kv, max_batch=rows)
        large = replace(bundle, manifest=replace(bundle.manifest, kv=kv))
        if rows == most:
            assert step_engine.lower_engine(large).graphs.scratch is not None
        else:
            with pytest.raises(BackendError, match=r"2,147,483,648 numbers for 524288 rows.*--max-batch"):
                step_engine.lower_engine(large)


def test_experts_that_the_arithmetic_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "large", architecture="mixtral", dtype="bfloat16", window=WINDOW)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][3, 5] = -1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with shared_traces():
        bundle = export(source, tmp_path / "bundle", chunk=CHUNK, prove=False)
    with pytest.raises(BundleError, match=r"number -9.*infinite in float16.*--arithmetic"):
        build(bundle, backend=BACKEND, arithmetic="float16")
    assert build(bundle, backend=BACKEND).folder.is_dir()
