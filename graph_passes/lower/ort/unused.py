"""Takes out of a graph what nothing reads."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common


def remove_unused(model: ir.Model, keep: Collection[str] = ()) -> None:
    """Remove nodes, initializers, functions and inputs of `model` that no output depends on, in place.

    keep: inputs that stay in any case, by name.
    """
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    outputs = set(model.graph.outputs)
    for value in list(model.graph.inputs):
        if not value.uses() and value not in outputs and value.name not in keep:
            model.graph.inputs.remove(value)
