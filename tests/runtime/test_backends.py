"""The table of backends, what each refuses, and the count of cores."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import BackendError, BundleError, load
from runtime.backends import BACKENDS
from runtime.backends import onnxruntime as backend
from runtime.backends.cores import physical_cores
from tests.support.toy_bundle import ToyModel, toy_manifest, write_manifest, write_toy_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle")


def test_an_unknown_backend_names_the_known(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"no backend 'cudnn'\. Available: onnxruntime"):
        load(folder, backend="cudnn")


def test_an_unknown_device_names_the_known(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"onnxruntime has no device 'cuda'\. Available: cpu"):
        load(folder, device="cuda")


def test_backend_and_device_can_be_named(folder: Path) -> None:
    assert load(folder, backend="onnxruntime", device="cpu", threads=1).forward([1]).shape == (1, 1, 37)


@pytest.mark.parametrize("threads", [0, -1, True, 1.0])
def test_threads_are_checked(folder: Path, threads: int) -> None:
    with pytest.raises(BackendError, match="positive integer"):
        load(folder, threads=threads)


def test_a_backend_whose_library_is_missing_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "elsewhere", "runtime.backends.of_another_planet")
    with pytest.raises(BackendError, match="elsewhere cannot be used"):
        load(folder, backend="elsewhere")


def test_a_graph_that_cannot_be_loaded_is_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"not a graph")
    write_manifest(folder, toy_manifest(folder, ToyModel(), []))
    with pytest.raises(BundleError, match=r"model\.onnx is not a readable ONNX graph"):
        load(folder)


def test_a_graph_that_onnx_runtime_refuses_is_refused(folder: Path) -> None:
    graph = (folder / "model.onnx").read_bytes()
    assert b"MatMul" in graph
    (folder / "model.onnx").write_bytes(graph.replace(b"MatMul", b"MatMal"))
    write_manifest(folder, toy_manifest(folder, ToyModel(), []))
    with pytest.raises(BackendError, match=r"cannot load .*model\.onnx"):
        load(folder)


def test_a_graph_of_other_names_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graph"]["token_counts"] = "counts"
    write_manifest(folder, manifest)
    with pytest.raises(BundleError, match=r"inputs of model\.onnx .* differ in: counts, token_counts"):
        load(folder)


def test_a_graph_of_other_sizes_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["kv"]["layers"][0]["capacity"] += 1
    write_manifest(folder, manifest)
    with pytest.raises(BundleError, match=r"input past\.0\.key of model\.onnx is tensor\(float\).*describes"):
        load(folder)


def test_a_graph_of_other_types_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["kv"]["dtype"] = "float16"
    write_manifest(folder, manifest)
    with pytest.raises(BundleError, match=r"input past\.0\.key of model\.onnx is tensor\(float\).*tensor\(float16\)"):
        load(folder)


def test_a_dtype_that_the_backend_was_not_proved_with_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "CAPABILITIES", replace(backend.CAPABILITIES, kv_dtypes=("float16", "int8")))
    with pytest.raises(BackendError, match=r"float32 KV buffers, but the backend onnxruntime runs only float16, in"):
        load(folder)


def test_hyper_threads_of_a_core_count_once(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    for core in allowed:
        topology = tmp_path / f"devices/system/cpu/cpu{core}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("0-999\n")
    assert physical_cores(tmp_path) == 1


def test_a_quota_limits_the_cores(tmp_path: Path) -> None:
    logical = physical_cores(tmp_path)  # nothing known of the topology: every logical core counts
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    (tmp_path / "fs/cgroup/cpu.max").write_text("150000 100000\n")
    assert physical_cores(tmp_path) == 1
    (tmp_path / "fs/cgroup/cpu.max").write_text("max 100000\n")
    assert physical_cores(tmp_path) == logical
