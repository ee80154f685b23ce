"""What a session says of native kernels, and of memory that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime import load
from runtime.backends import onnxruntime as backend
from runtime.bundle import read_bundle
from runtime.estimate import estimate
from runtime.graph_ops import plugin_ops
from runtime.kernels import kernels, why_none
from tests.support.bundles import exported
from tests.support.toy_bundle import write_toy_bundle


def test_a_session_names_the_ops_that_run_natively() -> None:
    bundle = exported().bundle
    found, session = kernels(), load(bundle, threads=1)
    ops = plugin_ops(bundle / "model.onnx")
    assert session.kernels == (() if found is None else tuple(op for op in ops if op in found.ops))
    assert session.notes == (() if found is not None else (why_none(),))


def test_without_kernels_a_session_names_none_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIERZO_KERNELS", "off")
    session = load(exported().bundle, threads=1)
    assert session.kernels == ()
    assert session.notes == (why_none(),)
    assert "CIERZO_KERNELS=off" in session.notes[0]


def test_a_graph_without_plugin_nodes_misses_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIERZO_KERNELS", "off")
    session = load(write_toy_bundle(tmp_path / "bundle"), threads=1)
    assert (session.kernels, session.notes) == ((), ())


def test_a_session_that_takes_more_than_is_free_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported().bundle
    needed = estimate(read_bundle(bundle).manifest, kernels_active=kernels() is not None)
    monkeypatch.setattr(backend, "folds_weights", lambda info, available, native: True)
    notes = {}
    for free in (None, needed.total, needed.total - 1):
        monkeypatch.setattr(backend, "available_memory", lambda free=free: free)
        notes[free] = load(bundle, threads=1).notes
    assert notes[None] == notes[needed.total]
    (added,) = set(notes[needed.total - 1]) - set(notes[None])
    assert added.startswith("This session takes about 0.1 GB of memory")
    assert "0.1 GB are free" in added
