"""Writes a graph in the middle of its way, for a person with a graph viewer."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from graph_passes.unbound import is_unbound


def dump(model: ir.Model, path: Path) -> None:
    """Save `model` to `path`; weights without data appear as inputs of their dtype and shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    initializers = dict(model.graph.initializers)
    unbound = [name for name, value in initializers.items() if is_unbound(value)]
    for name in unbound:
        model.graph.inputs.append(model.graph.initializers.pop(name))
    try:
        onnx.save(ir.to_proto(model), str(path))
    finally:
        del model.graph.inputs[len(model.graph.inputs) - len(unbound) :]
        model.graph.initializers.clear()
        model.graph.initializers.update(initializers)
