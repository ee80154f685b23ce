"""The traces that tests share give the bundles that an export makes for itself, whatever they were first made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter import export
from runtime.bundle import read_bundle
from tests.support.bundles import exported


@pytest.mark.parametrize(
    "first,then",
    [
        ({}, {"tie": True}),
        ({}, {"architecture": "phi3", "rope_theta": 5e5}),
        ({"architecture": "mixtral", "tie": True}, {"architecture": "mixtral", "tie": True, "rope_theta": 7.0}),
    ],
    ids=["tied", "of another name and theta", "a tied mixture"],
)
def test_a_shared_trace_is_the_same_graph(tmp_path: Path, first: dict[str, Any], then: dict[str, Any]) -> None:
    exported(**first)
    shared = exported(**then)
    alone = read_bundle(export(shared.checkpoint, tmp_path / "alone", chunk=4, max_batch=4))
    graphs = [bundle.file(bundle.manifest.graph.file).read_bytes() for bundle in (alone, read_bundle(shared.bundle))]
    assert graphs[0] == graphs[1]
