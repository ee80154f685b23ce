"""Quantised products as MatMulNBits, whose layout they have.

    QuantizedMatMul(x, packed, scale, zero)  →  MatMulNBits(x, packed, scale, zero)

The rows are not rounded to 8 bits, as the operator allows, and so a NaN among them shows without further care.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.lower.ort.nodes import MICROSOFT
from graph_passes.lower.ort.rewriting import dtype_of, input_of, insert, is_op, like, substitute, weight_as
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from runtime.errors import FusionError

LARGEST_BLOCK_OF_FOUR_BITS = 128
"""The kernel for a single row has blocks of 16 to 128 numbers of 4 bits; numbers of 8 bits may have any."""


def lower_quantized_products(model: ir.Model) -> int:
    """Rewrite every QuantizedMatMul of `model` in place; returns how many there were.

    Raises FusionError for blocks that the kernels lack and for scales that would be rounded.
    """
    found = [node for node in model.graph if is_op(node, QUANTIZED_MATMUL.name)]
    for node in found:
        rows, packed, scale = (input_of(node, index) for index in range(3))
        zero = node.inputs[3] if len(node.inputs) > 3 else None
        sizes = {key: node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size")}
        if sizes["bits"] == 4 and sizes["block_size"] > LARGEST_BLOCK_OF_FOUR_BITS:
            raise FusionError(
                f"{node.name}: the weights have blocks of {sizes['block_size']} numbers, and ONNX Runtime's products "
                f"on a GPU have at most {LARGEST_BLOCK_OF_FOUR_BITS} for 4 bits. Export the checkpoint with "
                f"--block-size {LARGEST_BLOCK_OF_FOUR_BITS} (block_size={LARGEST_BLOCK_OF_FOUR_BITS}) or less."
            )
        scale = scales_as(model, node, scale, dtype_of(rows))
        old = node.outputs[0]
        made = like(old, f"{old.name}.rows")
        insert(model, node, "MatMulNBits", [rows, packed, scale, *([zero] if zero else [])], made, {**sizes}, MICROSOFT)
        substitute(model, node, old, made)
    return len(found)


def scales_as(model: ir.Model, node: ir.Node, scale: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Scales in the type of the rows. Raises FusionError where that would round them."""
    if dtype not in (scale.dtype, ir.DataType.FLOAT):
        raise FusionError(
            f"{node.name}: the weights have {called(dtype_of(scale))} scales, which would be rounded again, to "
            f"{called(dtype)}. Build with --arithmetic {called(dtype_of(scale))}, or export the original checkpoint "
            f"with --scales {called(dtype)} or with --weights fp32."
        )
    return weight_as(model, node, scale, dtype)


def called(dtype: ir.DataType) -> str:
    """The type's name as a user knows it."""
    return {ir.DataType.FLOAT: "float32"}.get(dtype, dtype.name.lower())
