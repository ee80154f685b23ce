"""What `cierzo build` and `cierzo inspect` show of engines of graphs for ONNX Runtime on CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from exporter.build.cuda_provider import CUDA, VERSION
from exporter.build.step_engine import BuiltSteps
from exporter.cli import cli
from exporter.inspect import inspect_path
from runtime.bundle import Bundle, read_bundle
from runtime.engine_files import read_engine_document
from runtime.engine_info import DECODE
from runtime.errors import BackendError, BundleError
from runtime.step_engine_info import GRAPHS, TOP, parse_step_engine
from runtime.weight_expression import pieces
from tests.support.built_steps import BACKEND, built, bundle_of
from tests.support.bundles import exported
from tests.support.inspecting import drawn


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> BuiltSteps:
    return built(bundle_of("window", tmp_path_factory.mktemp("window") / "bundle"))


def opened(engine: BuiltSteps) -> Bundle:
    return read_bundle(engine.folder.parents[1], verify=True)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_shows_nodes_by_place(tmp_path: Path) -> None:
    folder = bundle_of("window", tmp_path / "bundle").path
    result = run("build", folder, "--backend", BACKEND, "--arithmetic", "float16")
    assert result.exit_code == 0, result.output
    (name,) = read_bundle(folder).manifest.engines
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["op", "runs", "on", *GRAPHS] in rows
    counts = {row[0]: row[2:] for row in rows if row[1:2] == ["CUDA"]}
    assert counts["PagedAttention"] == ["2"]  # in the graph for many tokens alone
    assert counts["TensorScatter"] == ["4"]
    assert counts["TopK"] == ["1"]
    assert counts["FusedMatMul"] == ["11", "11"]
    text = result.stdout.replace("\n", "")
    assert f"ONNX Runtime {VERSION}, float16" in text
    assert f"wrote {folder}/engines/{name} (" in text
    assert "MB of weights, filled from model.safetensors when it is loaded" in text


def test_json_says_all(tmp_path: Path) -> None:
    folder = bundle_of("mixtral", tmp_path / "bundle").path
    result = run("build", folder, "--backend", BACKEND, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["backend"], told["version"], told["arithmetic"]) == (BACKEND, VERSION, "bfloat16")
    assert told["folder"] == str(folder / "engines" / told["engine"])
    assert set(told["graphs"]) == set(GRAPHS)
    for name, graph in told["graphs"].items():
        assert graph["bytes"] == (Path(told["folder"]) / f"{name}.onnx").stat().st_size
        assert set(graph["nodes"]) == {CUDA}
    assert told["graphs"][DECODE]["nodes"][CUDA]["MoE"] == 2
    assert told["weights"]["constants"] == 0
    document = read_engine_document(read_bundle(folder), told["engine"])
    info = parse_step_engine(document.name, document.root)
    assert told["weights"]["inputs"] == len(info.tensors)
    held = [np.concatenate(list(pieces(w.expression, read_bundle(folder).file, info.orders))) for w in info.tensors]
    assert told["weights"]["bytes"] == sum(data.nbytes for data in held)


def test_an_error_is_one_paragraph_and_an_object(tmp_path: Path) -> None:
    folder = bundle_of("window", tmp_path / "bundle").path
    result = run("build", folder, "--backend", BACKEND, "--plugins", "none", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "BackendError"
    assert "Engines for onnxruntime-cuda have no --plugins" in result.stderr


def test_inspect_shows_the_nodes_of_engines_that_were_built(windowed: BuiltSteps) -> None:
    folder = windowed.folder.parents[1]
    facts = inspect_path(folder).bundle
    assert facts is not None
    (engine,) = [engine for engine in facts.engines if engine.name == windowed.info.name]
    assert (engine.backend, engine.arithmetic, engine.kv) == (BACKEND, "bfloat16", "bfloat16")
    assert engine.bytes == sum(path.stat().st_size for path in windowed.folder.glob("*.onnx"))
    assert engine.nodes == {name: graph.placement for name, graph in windowed.info.graphs.items()}
    told = inspect_path(folder).to_json()["bundle"]
    assert told["engines"][0]["nodes"][DECODE][CUDA]["Attention"] == 2
    assert told["lowered"] is None
    assert f"Nodes of {windowed.info.name}" in drawn(inspect_path(folder))
    assert facts.kernels.standard["Gather"] > 0


def test_inspect_places_the_nodes_of_an_engine_that_was_not_built(tmp_path: Path) -> None:
    folder = bundle_of("window", tmp_path / "bundle").path
    result = run("inspect", folder, "--backend", BACKEND, "--arithmetic", "float16", "--json")
    assert result.exit_code == 0, result.output
    lowered = json.loads(result.stdout)["bundle"]["lowered"]
    assert (lowered["backend"], lowered["arithmetic"]) == (BACKEND, "float16")
    info = built(read_bundle(folder), arithmetic="float16").info
    assert lowered["nodes"] == {name: graph.placement for name, graph in info.graphs.items()}
    shown = run("inspect", folder, "--backend", BACKEND)
    assert "Nodes of an engine for onnxruntime-cuda, bfloat16" in shown.stdout
    assert lowered["nodes"][TOP] == {CUDA: {"IsNaN": 1, "TopK": 1, "Where": 1}}


def test_inspect_says_what_it_cannot_tell(windowed: BuiltSteps) -> None:
    folder = windowed.folder.parents[1]
    with pytest.raises(BackendError, match="decided by the library that builds it"):
        inspect_path(folder, backend="tensorrt")
    with pytest.raises(BackendError, match="Say for which backend"):
        inspect_path(folder, arithmetic="float16")
    with pytest.raises(BundleError, match="is no bundle"):
        inspect_path(exported(dtype="bfloat16").checkpoint, backend=BACKEND)


def test_inspect_names_what_is_wrong_with_an_engine(tmp_path: Path) -> None:
    engine = built(bundle_of("window", tmp_path / "bundle"))
    (engine.folder / "engine.json").write_text("{}")
    (told,) = inspect_path(engine.folder.parents[1]).to_json()["bundle"]["engines"]
    assert "build it again" in told["problem"]
