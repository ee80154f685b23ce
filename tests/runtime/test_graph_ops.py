"""Plugin nodes counted in the bytes of an ONNX file, held against the onnx package's own reading."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from exporter.write import MODEL_FILE
from runtime.errors import BundleError
from runtime.graph_ops import plugin_ops
from tests.support.bundles import exported

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixture of experts": {"architecture": "mixtral"},
    "by the front end transformers": {"frontend": "transformers"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_nodes_of_an_exported_graph(name: str) -> None:
    file = exported(**CASES[name]).bundle / MODEL_FILE
    nodes = onnx.load(file, load_external_data=False).graph.node
    counts = Counter(node.op_type for node in nodes if node.domain == "cierzo")
    assert counts["RollingAttention"] == 2
    assert plugin_ops(file) == counts
    assert list(plugin_ops(file)) == list(dict.fromkeys(node.op_type for node in nodes if node.domain == "cierzo"))


def test_nodes_of_functions_and_of_other_domains_do_not_count(tmp_path: Path) -> None:
    inner = helper.make_node("Inner", ["a"], ["b"], domain="cierzo")
    function = helper.make_function(
        "cierzo", "Outer", ["a"], ["b"], [inner], [helper.make_opsetid("cierzo", 1)], attributes=["scale"]
    )
    nodes = [
        helper.make_node("Outer", ["x"], ["y"], domain="cierzo", scale=0.5, name="cierzo"),
        helper.make_node("Outer", ["x"], ["z"], domain="com.microsoft"),
        helper.make_node("Add", ["x", "w"], ["u"]),
        helper.make_node("Last", ["u"], ["v"], domain="cierzo", doc_string="Outer"),
    ]
    weight = numpy_helper.from_array(np.arange(5000, dtype=np.float32), "w")
    model = helper.make_model(helper.make_graph(nodes, "graph", [], [], [weight]), functions=[function])
    file = tmp_path / MODEL_FILE
    onnx.save(model, file)
    assert plugin_ops(file) == {"Outer": 1, "Last": 1}
    file.write_bytes(b"")
    assert plugin_ops(file) == {}


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.onnx is not a readable ONNX graph \(.*No such file"):
        plugin_ops(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"\x3a\x05\x0a", "ends behind its message"),
        (b"\x3b", "unknown kind 3"),
        (b"\xff" * 20, "more than 10 bytes"),
        (b"\x3a", "out of range"),
        (b"\x3a\x0d\x0a\x0b\x22\x01\xff\x3a\x06cierzo", "can't decode byte 0xff"),
        (helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()[:-1], "ends behind its message"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / MODEL_FILE).write_bytes(content)
    with pytest.raises(BundleError, match=cause):
        plugin_ops(tmp_path / MODEL_FILE)


def test_no_damage_does_anything_but_refuse_or_count(tmp_path: Path) -> None:
    whole = (exported().bundle / MODEL_FILE).read_bytes()
    rng, file, refused = np.random.default_rng(0), tmp_path / MODEL_FILE, 0
    for _ in range(200):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(damaged), 4):
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)])
        try:
            plugin_ops(file)
        except BundleError:
            refused += 1
    assert refused > 0
