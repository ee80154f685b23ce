"""The process that builds: what it is told, what becomes of its end, its progress, and what the library refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from exporter.build import child
from exporter.build.child import run_job
from exporter.build.job import BuildJob, read_job
from exporter.build.kernels import ATTENTION, COPY, HOST, OTHER, PLUGIN, PRODUCT, read_kernels, summary
from exporter.build.progress import Percent
from exporter.build.worker import ABANDONED
from runtime.engine_info import INPUT, REFIT, EngineWeight, PlanProfile
from runtime.errors import BackendError
from runtime.weight_expression import Concat, Rows, Signed, Stored
from tests.layout.imports import ROOT
from tests.support.tensorrt_rtx import tensorrt_rtx

tensorrt_rtx()

READ = "import json, os, sys, time; job = json.loads(sys.stdin.readline()); "


def job(folder: Path, model: onnx.ModelProto | None = None, **changes: object) -> BuildJob:
    """A job with one plan, of 1 to 4 rows. Its graph has one input, `x` [B, 8]."""
    graph = folder / "graph.onnx"
    if model is not None:
        graph.write_bytes(model.SerializeToString())
    whole = BuildJob(
        flavor="tensorrt-rtx",
        compute_capability="8.9",
        plugins=(),
        plugin_nodes=0,
        onnx=str(graph),
        folder=str(folder),
        plans={"prefill": (PlanProfile(1, 4, 1, 1),)},
        inputs={"x": ("B", 8)},
        weights=(),
        embedded=False,
        orders={},
        files={},
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def model(*nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT16, output: int | None = None) -> onnx.ModelProto:
    """A graph of `nodes` from `x` [B, 8] to `y`."""
    inputs = [helper.make_tensor_value_info("x", kind, ["B", 8])]
    outputs = [helper.make_tensor_value_info("y", kind if output is None else output, None)]
    graph = helper.make_graph(list(nodes), "graph", inputs, outputs)
    return helper.make_model(
        graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("cierzo", 1)]
    )


def refusal(what: BuildJob) -> str:
    with pytest.raises(BackendError) as caught:
        run_job(what, lambda *_: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pretend(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let `script` be what builds."""
    monkeypatch.setattr(child, "WORKER", (sys.executable, "-c", READ + script))


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    stored = Stored("a.safetensors", 16, "U8", (4, 2, 16))
    weights = (
        EngineWeight("w.packed", "I4", (4, 64), REFIT, Signed(Concat((stored, stored)), "I4")),
        EngineWeight("n", "U8", (4, 2, 16), INPUT, Rows(stored, "order")),
    )
    written = job(tmp_path, weights=weights, orders={"order": (2, 0, 1)}, files={"a.safetensors": "b"}, plugins=("P",))
    assert read_job(json.loads(json.dumps(written.to_json()))) == written


def test_results_and_progress_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(
        monkeypatch,
        "print(json.dumps({'progress': ['prefill', 7]})); print('noise', file=sys.stderr); "
        "print(json.dumps({'done': {'folder': job['folder']}}))",
    )
    told: list[tuple[str, int]] = []
    assert run_job(job(tmp_path), lambda plan, percent: told.append((plan, percent))) == {"folder": str(tmp_path)}
    assert told == [("prefill", 7)]


ENDS = {
    "os.write(2, b'terminate called\\n'); os.abort()": ("by SIGABRT", "terminate called"),
    "os.kill(os.getpid(), 9)": ("by SIGKILL", "more memory than there is"),
    "os._exit(3)": ("with exit code 3", "nothing"),
    "raise ValueError('odd')": ("with exit code 1", "ValueError: odd"),
    "print(json.dumps({'done': {}}), flush=True); os.kill(os.getpid(), 11)": ("by SIGSEGV", "nothing"),
    "os._exit(0)": ("with exit code 0", "nothing"),
    """print('{"done": {}', end='', flush=True)""": ("with exit code 0", "nothing"),
}


@pytest.mark.parametrize("script", ENDS)
def test_a_process_that_ends_otherwise_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    pretend(monkeypatch, script)
    found = refusal(job(tmp_path))
    for part in ENDS[script]:
        assert part in found


def test_a_refusal_keeps_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "print(json.dumps({'refused': 'No such thing.'})); os._exit(2)")
    assert refusal(job(tmp_path)) == "No such thing."


def test_an_interrupted_build_takes_its_process_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "print(json.dumps({'progress': [str(os.getpid()), 1]}), flush=True); time.sleep(600)")
    numbers: list[int] = []

    def interrupt(plan: str, _: int) -> None:
        numbers.append(int(plan))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job(tmp_path), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(numbers[0], 0)


def test_a_process_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "graph.onnx")  # a graph that never comes, so that it is busy until then
    process = subprocess.Popen(child.WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(job(tmp_path).to_json()).encode() + b"\n")
    process.stdin.close()
    assert process.stdout.read() == b""
    process.stdout.close()
    assert process.wait() == ABANDONED


def test_what_the_parser_does_not_take_is_named_by_its_node(tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["x"], ["y"], name="layers.0.odd")
    graph = model(node, output=TensorProto.INT64)
    found = refusal(job(tmp_path, graph))
    assert "NonZero 'layers.0.odd'" in found or "layers.0.odd" in found
    assert "tensorrt-rtx 1.7" in found


def test_a_node_that_no_plugin_took_is_refused(tmp_path: Path) -> None:
    graph = model(helper.make_node("Identity", ["x"], ["y"]))
    found = refusal(job(tmp_path, graph, plugins=("MoEGate",), plugin_nodes=1))
    assert "gave 0 of 1 nodes to the plugins asked for (MoEGate)" in found


def test_a_plugin_tells_which_type_it_does_not_take(tmp_path: Path) -> None:
    gate = helper.make_node(
        "MoEGate", ["x"], ["y", "chosen"], name="gate", domain="cierzo", top_k=2, plugin_namespace="cierzo",
        plugin_version="1",
    )  # fmt: skip
    found = refusal(job(tmp_path, model(gate), plugins=("MoEGate",), plugin_nodes=1))
    assert "MoEGate" in found
    assert "float32" in found
    assert "'gate'" in found


def test_an_input_whose_numbers_are_a_shape_is_refused(tmp_path: Path) -> None:
    graph = model(helper.make_node("Reshape", ["x", "rows_and_columns"], ["y"]))
    graph.graph.input.append(helper.make_tensor_value_info("rows_and_columns", TensorProto.INT64, [2]))
    assert "takes shapes from the numbers of rows_and_columns" in refusal(job(tmp_path, graph))


def test_a_plan_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    graph = model(helper.make_node("Relu", ["x"], ["y"]))
    found = refusal(replace(job(tmp_path, graph), folder=str(tmp_path / "gone")))
    assert found.startswith("The plan prefill.plan of 0.")
    assert "No such file or directory" in found


def test_it_imports_what_this_process_does_and_stays_where_this_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataclasses.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    graph = model(helper.make_node("NonZero", ["x"], ["y"], name="odd"), output=TensorProto.INT64)
    assert "'odd'" in refusal(job(tmp_path, graph))
    pretend(monkeypatch, "print(json.dumps({'done': {'path': sys.argv[1:], 'folder': os.getcwd()}}))")
    assert run_job(job(tmp_path), lambda *_: None) == {"path": sys.path, "folder": str(tmp_path)}


def test_a_library_that_is_missing_is_named_by_the_process_too(tmp_path: Path) -> None:
    assert 'pip install "cierzo[tensorrt]"' in refusal(job(tmp_path, flavor="tensorrt"))


def test_nested_phases_add_up_to_one_number() -> None:
    told: list[int] = []

    def report(percent: int) -> bool:
        told.append(percent)
        return percent < 90

    percent = Percent(report)
    percent.start("whole", None, 2)
    percent.start("first", "whole", 4)
    going = [percent.step("first", index) for index in range(4)]
    assert told == [0, 12, 25, 37, 50]
    percent.finish("first")
    going.append(percent.step("whole", 0))
    percent.start("second", "whole", 5)
    percent.start("part", "second", 2)
    going.append(percent.step("part", 0))
    percent.finish("part")
    percent.start("part", "second", 10)  # a phase of that name comes again, and again begins
    going.append(percent.step("part", 0))
    assert told == [0, 12, 25, 37, 50, 55]
    percent.start("stray", "nowhere", 1)
    going.append(percent.step("stray", 0))
    assert told == [0, 12, 25, 37, 50, 55]
    assert all(going)
    percent.finish("whole")
    assert told[-1] == 100
    assert not percent.step("whole", 1), "nobody listens any more"


LISTED = """Layers:
Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: n, Location: Device, \
Dimensions: [], Datatype: Int64, Format: x }], ParameterType: ShapeH2D, Metadata:\x20
Name: 2_myl1_2, LayerType: gemm, Inputs: [ { Name: a+b, Dimensions: [-1,64], Strides: [64,1], Datatype: BFloat16, \
Format: (Linear) Row major }, { Name: w, Dimensions: [64,128], Datatype: BFloat16, Format: y }], Constants: [ { Name: \
c, Dimensions: [1], Datatype: Float, Format: z }], Outputs: [ { Name: out, Dimensions: [-1,128], Datatype: BFloat16, \
Format: y }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: 2 | layers.0.q+k (StoredMatMul)][ONNX Layer: split]
Name: _gemm_mha_v2_myl1_8, LayerType: kgen, Inputs: [], Outputs: [], Metadata:\x20
Name: __myl_ReshTran_myl1_9, LayerType: kgen, Inputs: [], Outputs: [], Metadata:\x20
Name: Reformatting CopyNode for Network Input x, LayerType: Reformat, Inputs: [], Outputs: [], Metadata:\x20
Name: gate_myl4_4, LayerType: custom_layer, Inputs: [], Outputs: [], Metadata:\x20
Name: __myl_ReshMulSum_myl0_3, LayerType: kgen, Inputs: [ { Name: x [profile 1], Dimensions: [1], Datatype: Float, \
Format: y }], Outputs: [], Metadata: [ONNX Layer: 2 | o (StoredMatMul)]
Name: __myl_FcCastAdd_myl0_4, LayerType: runtime_fusion, Inputs: [], Outputs: [], Metadata:\x20
Name: __myl_MulSum_myl0_5, LayerType: kgen, Inputs: [], Outputs: [], Metadata: [ONNX Layer: 3 | n (RMSNorm)]
Name: attention, LayerType: PluginV3, Inputs: [], Outputs: [], Metadata:\x20
"""


def test_the_library_s_list_is_read() -> None:
    found = read_kernels(LISTED)
    assert [kernel.kind for kernel in found] == [
        *(HOST, PRODUCT, ATTENTION, COPY, COPY, PLUGIN, PRODUCT, PRODUCT, OTHER, PLUGIN),
    ]
    product = found[1]
    assert product.inputs == ("a+b BFloat16[-1,64]", "w BFloat16[64,128]")
    assert product.outputs == ("out BFloat16[-1,128]",)
    assert product.nodes == ("layers.0.q+k (StoredMatMul)", "split")
    assert [kernel.profile for kernel in found] == [0] * 6 + [1] * 4
    assert found[6].inputs == ("x Float[1]",)
    counts = summary(found, 3)
    assert _counted(counts) == [(1, 1, 1, 2, 0), (2, 0, 1, 0, 1), (0, 0, 0, 0, 0)]


def _counted(counts: Sequence[Mapping[str, int]]) -> list[tuple[int, ...]]:
    order = (PRODUCT, ATTENTION, PLUGIN, COPY, OTHER)
    return [tuple(of_profile[kind] for kind in order) for of_profile in counts]
