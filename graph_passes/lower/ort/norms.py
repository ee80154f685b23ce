"""Norms as ONNX Runtime's kernels for them; the sum in front of one goes into the same kernel.

s = Add(stream, update); y = RMSNorm(s)   →   y, s = SkipSimplifiedLayerNormalization(stream, update)
y = RMSNorm(x)                            →   y = RMSNormalization(x)
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.lower.ort.nodes import MICROSOFT
from graph_passes.lower.ort.rewriting import dtype_of, input_of, insert, is_op, like, shape_of, substitute, weight_as
from graph_passes.ops.rms_norm import RMS_NORM

_ROW_AXES = (2, 3)
"""How many axes the rows of a SkipSimplifiedLayerNormalization may have, the last one included."""


def lower_norms(model: ir.Model) -> int:
    """Rewrite every RMSNorm of `model` in place; returns how many there were. Nodes may be out of order afterwards.

    A sum goes into the norm that reads it first; further norms of it read the sum.
    """
    found = [node for node in model.graph if is_op(node, RMS_NORM.name)]
    for node in found:
        rows = input_of(node, 0)
        weight = weight_as(model, node, input_of(node, 1), dtype_of(rows))
        epsilon = node.attributes["epsilon"].as_float()
        old = node.outputs[0]
        made = like(old, f"{old.name}.normed")
        addition = rows.producer()
        if addition is not None and _is_sum_of_rows(addition):
            total = like(rows, f"{rows.name}.total")
            terms = [input_of(addition, index) for index in range(2)]
            unused = [ir.Value(name=""), ir.Value(name="")]
            outputs = [made, *unused, total]
            insert(
                model,
                node,
                "SkipSimplifiedLayerNormalization",
                [*terms, weight],
                outputs,
                {"epsilon": epsilon},
                MICROSOFT,
            )
            substitute(model, node, old, made)
            substitute(model, addition, rows, total)
        else:
            insert(model, node, "RMSNormalization", [rows, weight], made, {"axis": -1, "epsilon": epsilon})
            substitute(model, node, old, made)
    return len(found)


def _is_sum_of_rows(node: ir.Node) -> bool:
    """Whether it adds two values of one shape and type, so that nothing is spread over axes."""
    if node.domain != "" or node.op_type != "Add":
        return False
    first, second = (input_of(node, index) for index in range(2))
    if first.shape is None or second.shape is None or len(first.shape) not in _ROW_AXES:
        return False
    known = all(isinstance(extent, int) or extent.value is not None for extent in shape_of(first))
    return known and first.shape == second.shape and first.dtype == second.dtype
