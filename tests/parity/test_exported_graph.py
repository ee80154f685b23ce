"""What is in an exported graph, and what is not any more: the fusion counts as a contract on the file itself.

Only the top level is counted: the function bodies of the plugin nodes are standard operators, as they should be.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import pytest

from exporter.write import MODEL_FILE
from tests.support.bundles import exported

CHUNK, CONTEXT = 13, 29
"""Chosen so that the rings' sizes, 4 + 13 − 1 = 16, 5 + 13 − 1 = 17 and 29, are no other size of these models."""

CASES: dict[str, tuple[list[int | None], dict[str, Any]]] = {
    "dense": ([5, 5, 5], {"num_layers": 3}),
    "heads not shared": ([5], {"num_layers": 1, "num_kv_heads": 4}),
    "mixture of experts": ([5, 5, 5], {"num_layers": 3, "architecture": "mixtral"}),
    "two kinds of layers": (
        [4, None, 4, 4],
        {"num_layers": 4, "architecture": "ministral", "layer_windows": [4, None, 4, 4]},
    ),
}
SLOTS = {4: 16, 5: 17, None: CONTEXT}


def graph_of(name: str) -> tuple[list[int | None], onnx.ModelProto]:
    windows, settings = CASES[name]
    case = exported(chunk=CHUNK, context=CONTEXT if None in windows else None, **settings)
    return windows, onnx.load(case.bundle / MODEL_FILE, load_external_data=False)


def shapes_of(graph: onnx.GraphProto) -> dict[str, tuple[int, list[str | int]]]:
    """Element type and dims of every value; a dim is its size or its symbol."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output, *graph.value_info)
    }


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.mark.parametrize("name", CASES)
def test_counts_of_the_plugin_nodes(name: str) -> None:
    windows, proto = graph_of(name)
    layers = len(windows)
    expected = {"RollingAttention": layers, "RMSNorm": 2 * layers + 1}
    if name == "mixture of experts":
        expected |= {"MoEGate": layers, "MixtureOfExperts": layers, "StoredMatMul": 5 * layers + 1}
    else:
        expected |= {"GatedActivation": layers, "StoredMatMul": 7 * layers + 1}
    assert Counter(node.op_type for node in proto.graph.node if node.domain == "cierzo") == expected
    called = {"RotaryEmbedding", "RollingKVWrite", "SlidingWindowAttention"}  # by the body of RollingAttention
    assert {function.name for function in proto.functions} == set(expected) | called
    for node in proto.graph.node:
        if node.domain:
            kept = attributes(node)
            assert (kept["plugin_namespace"], kept["plugin_version"]) == (b"cierzo", b"1")


@pytest.mark.parametrize("name", CASES)
def test_every_layer_has_its_own_window_and_ring(name: str) -> None:
    windows, proto = graph_of(name)
    shapes = shapes_of(proto.graph)
    attention = [node for node in proto.graph.node if node.op_type == "RollingAttention"]
    assert [attributes(node)["window"] or None for node in attention] == windows
    assert [attributes(node)["scale"] for node in attention] == pytest.approx([8**-0.5] * len(windows), rel=1e-7)
    for layer, (node, window) in enumerate(zip(attention, windows, strict=True)):
        assert list(node.input[5:7]) == [f"past.{layer}.key", f"past.{layer}.value"]
        assert list(node.output[1:]) == [f"present.{layer}.key", f"present.{layer}.value"]
        for part in ("key", "value"):
            assert shapes[f"past.{layer}.{part}"][1] == shapes[f"present.{layer}.{part}"][1]
            assert shapes[f"past.{layer}.{part}"][1][2] == SLOTS[window]
        scopes = next(entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes")
        assert f"layers.{layer}" in scopes


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_of_what_was_fused(name: str) -> None:
    windows, proto = graph_of(name)
    shapes = shapes_of(proto.graph)
    slots = {SLOTS[window] for window in windows}
    outputs = [output for node in proto.graph.node for output in node.output]
    assert outputs
    assert not set(outputs) - shapes.keys(), "every value must have a shape, or the checks below see nothing"
    for node in proto.graph.node:
        if node.domain:
            continue
        assert node.op_type not in ("Expand", "Softmax", "ScatterElements", "ScatterND", "Where", "TopK", "MatMul")
        assert not (node.op_type in ("Slice", "Neg", "Concat") and len(shapes[node.output[0]][1]) == 4)
    for output in outputs:
        element_type, dims = shapes[output]
        assert not (element_type == onnx.TensorProto.BOOL and len(dims) > 1), output
        assert not ("T" in dims and slots & set(dims)), f"{output} is a value of every token and every slot"
