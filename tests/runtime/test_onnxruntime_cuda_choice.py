"""Which engine of step graphs runs, beside those of other backends, and what a damaged one is answered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from runtime import BackendError, BundleError, load
from runtime.backends.onnxruntime_cuda import CAPABILITIES
from runtime.bundle import read_bundle
from runtime.engine_files import read_engine_document
from runtime.engine_info import DECODE, PREFILL
from runtime.onnxruntime_cuda.engine_choice import BuiltStepEngine, choose_step_engine
from runtime.step_engine_info import TOP, StepEngineInfo, parse_step_engine
from runtime.tensorrt.engine_choice import choose_engine
from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_steps import open_steps, write_step_engine

MODEL = ToyModel()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle", MODEL)


def chosen(folder: Path, asked: str | None = None, version: str = "1.31.7") -> BuiltStepEngine:
    return choose_step_engine(read_bundle(folder), asked, CAPABILITIES.name, version)


def test_the_only_one_that_fits_is_taken_and_says_what_was_written(folder: Path) -> None:
    info = write_step_engine(folder, MODEL, "this", version="1.31.1")
    write_step_engine(folder, MODEL, "other", version="1.30.2")
    found = chosen(folder)
    assert found.folder == folder / "engines" / "this"
    assert found.info == info
    assert {kind: path.name for kind, path in found.files().items()} == {
        PREFILL: "prefill.onnx", DECODE: "decode.onnx", TOP: "top.onnx",
    }  # fmt: skip


def test_a_bundle_without_engines_says_how_to_build_one(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"No engine was built.*`cierzo build .*--backend onnxruntime-cuda`"):
        chosen(folder)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "tensorrt"}, "is for the backend 'tensorrt'"),
    "graph": ({"graph_sha256": "0" * 64}, r"was built of another model\.onnx: the bundle was exported again since"),
    "chunk": ({"chunk": 2}, "takes 4 rows of 2 tokens at most, and the bundle has 4 of 3"),
    "rows": ({"max_batch": 1}, "takes 1 rows of 3 tokens at most"),
    "older": (
        {"version": "1.30.2"},
        r"is for ONNX Runtime 1\.30 \(`pip install '.*==1\.30\.\*'`\), and 1\.31\.7 is",
    ),
    "newer": ({"version": "1.310.0"}, r"is for ONNX Runtime 1\.310 \(.*\), and 1\.31\.7 is installed"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_one_that_does_not_fit_is_refused_with_the_reason(folder: Path, name: str) -> None:
    changes, words = MISFITS[name]
    write_step_engine(folder, MODEL, "this", **{"version": "1.31.1", **changes})
    with pytest.raises(BackendError, match=f"runs here: this {words}.*`cierzo build"):
        chosen(folder)
    with pytest.raises(BackendError, match=f"this {words}"):
        chosen(folder, "this")


def test_of_several_that_fit_one_must_be_named(folder: Path) -> None:
    for name in ("a", "b"):
        write_step_engine(folder, MODEL, name, version="1.31.1")
    with pytest.raises(BackendError, match=r"Several engines .* run here: a, b\. Name one of them with --engine"):
        chosen(folder)
    assert chosen(folder, "b").info.name == "b"
    with pytest.raises(BackendError, match=r"has no engine 'c'\. It has a, b\."):
        chosen(folder, "c")


def test_another_backend_passes_it_by(folder: Path) -> None:
    write_step_engine(folder, MODEL, "graphs")
    with pytest.raises(BackendError, match=r"runs here: graphs is for the backend 'onnxruntime-cuda'"):
        choose_engine(read_bundle(folder), None, "8.9", "tensorrt")
    with pytest.raises(BackendError, match="not an engine that was built of it such as 'graphs'"):
        load(folder, engine="graphs")


def test_an_engine_json_of_no_backend(folder: Path) -> None:
    write_step_engine(folder, MODEL, "this")
    document = read_engine_document(read_bundle(folder), "this")
    assert document.backend == CAPABILITIES.name
    with pytest.raises(BundleError, match=r"`engine this: backend` must be .*missing"):
        _ = replace(document, root=replace_data(document.root, {})).backend


def replace_data(section: Any, data: dict[str, Any]) -> Any:
    return type(section)(data, section.path, section.document)


def test_damaged_files_are_refused(folder: Path) -> None:
    write_step_engine(folder, MODEL, "this", version="1.31.1")
    place = folder / "engines" / "this"
    graph = place / "decode.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + b"x")
    with pytest.raises(BundleError, match=r"graph .*decode\.onnx has another content"):
        chosen(folder).files()
    graph.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"has {len(content) - 1} bytes and not {len(content)}: it was damaged"):
        chosen(folder).files()
    graph.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        chosen(folder).files()
    (place / "engine.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match=r"damaged or changed\. Delete the engine's folder and build it again"):
        chosen(folder)


# -- graphs that are not what engine.json says ------------------------------------------------------------------------


def changed(folder: Path, kind: str, change: Any) -> StepEngineInfo:
    """The engine with a graph that was changed."""
    info = write_step_engine(folder, MODEL, "this")
    path = folder / "engines" / "this" / f"{kind}.onnx"
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    return info


def renamed(graph: Any) -> None:
    graph.input[0].name = "elsewhere"
    for node in graph.node:
        node.input[:] = ["elsewhere" if name in ("input_ids", "logits") else name for name in node.input]


def surplus(graph: Any) -> None:
    graph.output.append(onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.INT64, ["B"]))
    graph.node.append(onnx.helper.make_node("Identity", ["start_positions"], ["extra"]))


def narrowed(graph: Any) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("logits2", onnx.TensorProto.FLOAT, ["N", 36]))
    graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 40]))
    del graph.input[1]


def without_counts(graph: Any) -> None:
    """As a graph without windows is: this one takes the starts for counts, which only makes its numbers wrong."""
    kept = [value for value in graph.input if value.name != "token_counts"]
    del graph.input[:]
    graph.input.extend(kept)
    for node in graph.node:
        node.input[:] = ["start_positions" if name == "token_counts" else name for name in node.input]


def test_only_windows_need_counts(folder: Path) -> None:
    opened = open_steps(folder, changed(folder, PREFILL, without_counts))
    assert opened.session.forward([1, 2, 3]).shape == (1, 3, MODEL.vocab_size)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (PREFILL, renamed, "The inputs of .*prefill.onnx of the engine this are not those .*elsewhere, input_ids"),
        (DECODE, renamed, "elsewhere, input_ids"),
        (DECODE, surplus, "The outputs of .*differ in extra"),
        (TOP, renamed, "elsewhere, logits"),
        (TOP, narrowed, r"logits in the graph top.onnx of the engine this is tensor\(float\) \['N', 40\]"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_graphs_of_another_interface_are_refused(folder: Path, kind: str, change: Any, words: str) -> None:
    info = changed(folder, kind, change)
    with pytest.raises(BundleError, match=words):
        open_steps(folder, info)


def test_rings_of_another_size_or_type_are_refused(folder: Path) -> None:
    info = write_step_engine(folder, MODEL, "this")
    for wrong in (
        replace(info, rings=(replace(info.rings[0], slots=5, window=5),)),
        replace(info, kv="float16"),
        replace(info, kv="float8"),
    ):
        with pytest.raises(BundleError, match=r"past\.0\.key in the graph|rings of the type 'float8'"):
            open_steps(folder, wrong)


def test_a_graph_that_cannot_be_loaded(folder: Path) -> None:
    info = write_step_engine(folder, MODEL, "this")
    (folder / "engines" / "this" / "decode.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=rf"ONNX Runtime {ort.__version__} cannot load .*decode\.onnx: "):
        open_steps(folder, info)


def test_engine_json_reads_back(folder: Path) -> None:
    info = write_step_engine(folder, MODEL, "this", constants=("lm_head",))
    document = read_engine_document(read_bundle(folder), "this")
    assert parse_step_engine("this", document.root) == info
    assert json.loads(document.content)["graphs"].keys() == {PREFILL, DECODE, TOP}
