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
    """A copy of the bundle in which these elements of a parameter, counted flat, are larger by `by`.

    The parameter lies in one piece; elements are counted as they are stored.
    """
    shutil.copytree(bundle, folder)  # what was linked is copied, so that the checkpoint stays as it is
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    (tensor,) = [tensor for tensor in graph.initializer if tensor.name in (parameter, f"{parameter}.stored")]
    place = {entry.key: entry.value for entry in tensor.external_data}
    path, begin, length = folder / place["location"], int(place["offset"]), int(place["length"])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, dtype, length // dtype.itemsize, begin).copy()
    values[list(elements)] += np.array(by, dtype)
    data[begin : begin + length] = values.tobytes()
    path.write_bytes(bytes(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"]["files"][path.name] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "blocks_sha256": None,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
