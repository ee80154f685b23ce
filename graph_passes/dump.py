"""Writes a graph in the middle of its way, for a person with a graph viewer."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from graph_passes.unbound import is_unbound


def dump(model: ir.Model, path: Path) -> None:
    """Save `model` to `path`; weights without data appear as inputs of their dtype and shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unbound = [value for value in model.graph.initializers.values() if is_unbound(value)]
    for value in unbound:
        model.graph.initializers.pop(str(value.name))
    model.graph.inputs.extend(unbound)
    try:
        onnx.save(ir.to_proto(model), str(path))
    finally:
        for value in unbound:
            model.graph.inputs.pop()
        for value in unbound:
            model.graph.initializers[str(value.name)] = value
