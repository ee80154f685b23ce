"""Faults planted in a bundle that still loads: in its graph, or in its weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx


def planted(bundle: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the bundle with a changed graph, its manifest brought up to date so that it loads."""
    shutil.copytree(bundle, folder)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(model)
    data = model.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def attribute(model: onnx.ModelProto, op: str, name: str, index: int = 0) -> onnx.AttributeProto:
    """An attribute of the index-th node of that op."""
    node = [node for node in model.graph.node if node.op_type == op][index]
    (found,) = [a for a in node.attribute if a.name == name]
    assert isinstance(found, onnx.AttributeProto)
    return found


def node(model: onnx.ModelProto, op: str, index: int = 0) -> onnx.NodeProto:
    """The index-th node of that op."""
    found: onnx.NodeProto = [node for node in model.graph.node if node.op_type == op][index]
    return found


def body_node(model: onnx.ModelProto, op: str, inner: str) -> onnx.NodeProto:
    """The only node of operator `inner` in the function body of `op`."""
    found: onnx.NodeProto
    (found,) = [node for body in model.functions if body.name == op for node in body.node if node.op_type == inner]
    return found


def with_weights(bundle: Path, folder: Path, parameter: str, elements: Sequence[int], by: float) -> Path:
    """A copy of the bundle in which these elements of a parameter, counted flat, are larger by `by`."""
    shutil.copytree(bundle, folder)
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[parameter]["data_offsets"]
    values = np.frombuffer(data, np.float32, (end - begin) // 4, 8 + length + begin).copy()
    values[list(elements)] += np.float32(by)
    data[8 + length + begin : 8 + length + end] = values.tobytes()
    path.write_bytes(bytes(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
