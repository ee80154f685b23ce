"""Products with stored weights as FusedMatMul, which reads a weight as it lies: [N, K], not turned.

    StoredMatMul(x, W)  →  FusedMatMul<transB = 1>(x, W)

On a GPU that is one call of cuBLAS for all rows, whatever axes they have; Gemm would be the same call, but takes rows
of one axis only.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.lower.ort.nodes import MICROSOFT
from graph_passes.lower.ort.rewriting import dtype_of, input_of, insert, is_op, like, substitute, weight_as
from graph_passes.ops.stored_matmul import STORED_MATMUL


def lower_products(model: ir.Model) -> int:
    """Rewrite every StoredMatMul of `model` in place, weights read in the type of the rows; returns how many."""
    found = [node for node in model.graph if is_op(node, STORED_MATMUL.name)]
    for node in found:
        rows = input_of(node, 0)
        weight = weight_as(model, node, input_of(node, 1), dtype_of(rows))
        old = node.outputs[0]
        made = insert(
            model, node, "FusedMatMul", [rows, weight], like(old, f"{old.name}.rows"), {"transB": 1}, MICROSOFT
        )
        substitute(model, node, old, made)
    return len(found)
