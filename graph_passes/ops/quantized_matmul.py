"""QuantizedMatMul: rows times a weight of 4-bit or 8-bit numbers with a scale for each block.

    w[n, k] = scale[n, k / block] · (q[n, k] − zero[n, k / block])

The layout is that of ONNX Runtime's MatMulNBits, which is the function body: blocks lie one after the other along K, of
two 4-bit numbers in a byte the first is the low half, and without zero points it is 8 (4 bits) or 128 (8 bits).
Implementations may round the activations of a block to 8 bits (MatMulNBits' accuracy level 4); Dettmers et al. 2022,
arXiv:2208.07339, has what that costs and why blocks keep it small.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes

MICROSOFT = {"com.microsoft": 1}


def product(x: str, packed: str, scale: str, zero: str, y: str, K: str, N: str) -> str:
    """The statements of one product; scales are widened to the type of the activations, as MatMulNBits wants them.

    ONNX Runtime's MatMulNBits rounds a NaN to some number when it rounds activations, and nobody would see that there
    was one. So x - x is added up, which is 0, or NaN where an element of the row is infinite or NaN: by a product with
    ones, since ONNX Runtime's ReduceSum gives no rows at all (of which nobody asks for logits) another shape.
    """
    return f"""
    {y}_one_raw = Constant <value_floats = [1.0]> ()
    {y}_one = CastLike ({y}_one_raw, {x})
    {y}_width = Shape <start = -1> ({x})
    {y}_1 = Constant <value_ints = [1]> ()
    {y}_column = Concat <axis = 0> ({y}_width, {y}_1)
    {y}_ones = Expand ({y}_one, {y}_column)
    {y}_nothing = Sub ({x}, {x})
    {y}_fault = MatMul ({y}_nothing, {y}_ones)
    {y}_scale = CastLike ({scale}, {x})
    {y}_product = com.microsoft.MatMulNBits <K: int = @{K}, N: int = @{N}, bits: int = @bits,
        block_size: int = @block_size, accuracy_level = 4> ({x}, {packed}, {y}_scale, {zero})
    {y} = Add ({y}_product, {y}_fault)
    """


def _body(attributes: Attributes) -> str:
    return product("x_K", "packed_NBb", "scale_NB", "zero_NZ", "y_N", "K", "N")


def blocks(K: int, block_size: int) -> int:
    """Blocks of a row, the last one perhaps filled up."""
    return -(-K // block_size)


def zero_bytes(K: int, block_size: int, bits: int) -> int:
    """Bytes of a row's zero points."""
    return -(-blocks(K, block_size) * bits // 8)


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """One row and three; all numbers and zero points there are, the filled-up end of the last block among them."""
    K, N, bits, size = (int(attributes[name]) for name in ("K", "N", "bits", "block_size"))
    B = blocks(K, size)
    for rows in (1, 3):
        x = rng.standard_normal((rows, K), dtype=np.float32)
        packed = rng.integers(0, 256, (N, B, size * bits // 8), dtype=np.uint8)
        scale = rng.random((N, B), dtype=np.float32)
        yield x, packed, scale, rng.integers(0, 256, (N, zero_bytes(K, size, bits)), dtype=np.uint8)


QUANTIZED_MATMUL = PluginOp(
    name="QuantizedMatMul",
    inputs=("x_K", "packed_NBb", "scale_NB", "zero_NZ"),
    outputs=("y_N",),
    attributes={"K": "int", "N": "int", "bits": "int", "block_size": "int"},
    body=_body,
    examples=_examples,
    rows=True,
    imports=MICROSOFT,
    optional=1,
)
"""x float32 [..., K]; packed uint8 [N, B, block_size·bits/8], B = ⌈K/block_size⌉; scale float16 or float32 [N, B]; zero
uint8 [N, ⌈B·bits/8⌉] or left out; to float32 [..., N]."""
