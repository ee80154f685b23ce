"""Profiles: what ONNX Runtime's events are read as, and the session's side of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime import SessionError, load
from runtime.backends.onnxruntime_profile import read_profile
from tests.support.toy_bundle import ToyModel, write_toy_bundle


def event(name: str, begin: int, length: int, op: str | None = None) -> dict[str, Any]:
    category = "Session" if op is None else "Node"
    return {"name": name, "cat": category, "ts": begin, "dur": length, "args": {} if op is None else {"op_name": op}}


def test_events_become_steps(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    events = [
        {"name": "process_name", "ph": "M"},
        event("session_initialization", 0, 50),
        event("model_run", 100, 40),
        event("b_kernel_time", 120, 10, "MatMul"),
        event("a_kernel_time", 105, 15, "Gemm"),
        event("model_run", 200, 60),
        event("loop_kernel_time", 210, 30, "Loop"),
        event("inner_kernel_time", 212, 5, "Add"),
        event("inner_again_kernel_time", 235, 5, "Add"),
        event("_inlfunc_MoEGate_token_3_2_kernel_time", 240, 4, "TopK"),
        event("_inlfunc_MoEGate_token_3_2_fence_before", 240, 4, "TopK"),
    ]
    file.write_text(json.dumps(events))
    first, second = read_profile(file)
    assert first.seconds == pytest.approx(40e-6)
    assert [(node.name, node.op, node.plugin) for node in first.nodes] == [("a", "Gemm", None), ("b", "MatMul", None)]
    assert second.seconds == pytest.approx(60e-6)
    assert [(node.op, node.plugin) for node in second.nodes] == [("Loop", None), ("TopK", "MoEGate")]
    assert [node.seconds for node in second.nodes] == pytest.approx([30e-6, 4e-6])


def test_a_session_profiles_every_step_once(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "toy", ToyModel(chunk=3))
    folder = tmp_path / "profile"
    folder.mkdir()
    session = load(bundle, threads=1, profile=folder)
    session.forward([1, 2, 3, 4])
    session.forward_last([5])
    steps = session.end_profile()
    assert len(steps) == 3, "two chunks and a token"
    for step in steps:
        assert 0 < sum(node.seconds for node in step.nodes) <= step.seconds
        assert {"MatMul", "Softmax"} <= {node.op for node in step.nodes}
    assert list(folder.iterdir()), "the raw profile stays"
    session.forward([6])  # goes on without
    with pytest.raises(SessionError, match="no profile to end"):
        session.end_profile()


def test_a_session_without_a_profile_says_so(tmp_path: Path) -> None:
    session = load(write_toy_bundle(tmp_path / "toy"), threads=1)
    session.forward([1])
    with pytest.raises(SessionError, match=r"Give load\(\.\.\., profile=folder\)"):
        session.end_profile()
