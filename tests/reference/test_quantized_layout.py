"""The layout of quantised weights, number by number, and against the operator of ONNX Runtime that defines it."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from reference.quantized_layout import QuantizedFormat, dequantize, pack_rows, scale_dtype, unpack
from runtime.errors import ExportError

FORMATS = [
    QuantizedFormat(bits, block_size, zero_points, scale)
    for bits, block_size, zero_points, scale in itertools.product((4, 8), (16, 32, 128), (False, True), ("F16", "F32"))
]
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def random_rows(rows: int, columns: int, quantized: QuantizedFormat) -> Rows:
    generator = torch.Generator().manual_seed(columns)
    blocks, top = quantized.blocks(columns), quantized.largest + 1
    q = torch.randint(0, top, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand((rows, blocks), generator=generator).to(scale_dtype(quantized)) + 0.01
    zero = torch.randint(0, top, (rows, blocks), generator=generator, dtype=torch.uint8)
    return q, scale, zero if quantized.zero_points else None


def test_the_bytes_of_a_small_matrix() -> None:
    """Two rows of 20 numbers in blocks of 16: the second block is partial and filled with its zero point."""
    q = torch.arange(40, dtype=torch.uint8).view(2, 20) % 16
    scale, zero = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5, 6], [7, 9]], dtype=torch.uint8)
    rows = pack_rows(q, scale, zero, QuantizedFormat(4, 16, True, "F32"))
    assert rows.packed.shape == (2, 2, 8)
    assert rows.packed[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert rows.packed[0, 1].tolist() == [0x10, 0x32, *[0x66] * 6]
    assert rows.packed[1, 1].tolist() == [0x54, 0x76, *[0x99] * 6]
    assert rows.zero is not None
    assert rows.zero.tolist() == [[0x65], [0x97]]
    without = pack_rows(q, scale, None, QuantizedFormat(4, 16, False, "F32"))
    assert without.zero is None
    assert without.packed[0, 1].tolist() == [0x10, 0x32, *[0x88] * 6]
    wide = pack_rows(q + 100, scale, zero, QuantizedFormat(8, 16, True, "F32"))
    assert wide.packed[1, 1].tolist() == [104, 105, 106, 107, *[9] * 12]
    assert wide.zero is not None
    assert wide.zero.tolist() == [[5, 6], [7, 9]]


@pytest.mark.parametrize("columns", [1, 16, 33, 96, 256])
@pytest.mark.parametrize("quantized", FORMATS, ids=str)
def test_unpacking_undoes_packing(quantized: QuantizedFormat, columns: int) -> None:
    q, scale, zero = random_rows(5, columns, quantized)
    rows = pack_rows(q, scale, zero, quantized)
    assert rows.packed.shape == (5, quantized.blocks(columns), quantized.block_bytes)
    assert rows.packed.numel() == 5 * quantized.row_bytes(columns)
    assert rows.zero is None or rows.zero.shape == (5, quantized.zero_bytes(columns))
    found_q, found_zero = unpack(rows, quantized, columns)
    assert torch.equal(found_q, q)
    assert torch.equal(found_zero, torch.full_like(found_zero, quantized.middle) if zero is None else zero)
    by_column = torch.arange(columns) // quantized.block_size
    want = scale.double()[:, by_column] * (q.double() - found_zero.double()[:, by_column])
    assert torch.equal(dequantize(rows, quantized, columns, torch.float64), want)
    narrow = dequantize(rows, quantized, columns, torch.float32)
    assert narrow.is_contiguous()
    assert torch.equal(narrow, want.float())  # a product of 24 and 9 bits, rounded once in both ways
    assert torch.equal(dequantize(rows, quantized, columns, torch.bfloat16), narrow.bfloat16())


@pytest.mark.parametrize("columns", [32, 80])
@pytest.mark.parametrize("quantized", [f for f in FORMATS if f.block_size < 128], ids=str)
def test_it_is_the_layout_of_matmul_n_bits(quantized: QuantizedFormat, columns: int) -> None:
    """ONNX Runtime multiplies a unit matrix with it: what comes out are the values themselves."""
    q, scale, zero = random_rows(8, columns, quantized)
    rows = pack_rows(q, scale, zero, quantized)
    dtype = TensorProto.FLOAT16 if quantized.scale == "F16" else TensorProto.FLOAT
    if dtype == TensorProto.FLOAT16:  # the operator's scales have the type of its input; they are small integers here
        scale = (scale * 8).round().clamp(1, 8)
        rows = pack_rows(q, scale, zero, quantized)
    inputs = {"packed": rows.packed.numpy(), "scale": rows.scale.numpy()}
    if rows.zero is not None:
        inputs["zero"] = rows.zero.numpy()
    node = helper.make_node(
        "MatMulNBits", ["unit", *inputs], ["y"], domain="com.microsoft",
        K=columns, N=8, bits=quantized.bits, block_size=quantized.block_size,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("unit", dtype, [columns, columns])],
        [helper.make_tensor_value_info("y", dtype, [columns, 8])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in inputs.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    unit = np.eye(columns, dtype=np.float16 if dtype == TensorProto.FLOAT16 else np.float32)
    (found,) = session.run(None, {"unit": unit})
    want = dequantize(rows, quantized, columns, torch.float32).numpy()
    np.testing.assert_allclose(np.asarray(found, np.float32).T, want, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ((3, 32, False, "F16"), "bits = 3. Choose one of 4, 8"),
        ((4, 48, False, "F16"), "block_size = 48. Choose one of 16, 32, 64, 128, 256"),
        ((4, 8, False, "F16"), "block_size = 8"),
        ((4, 32, False, "BF16"), "scale = 'BF16'. Choose one of F16, F32"),
    ],
)
def test_formats_that_there_are_not(arguments: tuple[int, int, bool, str], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        QuantizedFormat(*arguments)


def test_rows_that_the_format_does_not_hold() -> None:
    quantized = QuantizedFormat(4, 16, True, "F16")
    q, scale, zero = random_rows(2, 40, quantized)
    assert zero is not None
    cases: tuple[tuple[Rows, str], ...] = (
        ((q + 10, scale, zero), "end at 15"),
        ((q, scale, zero + 10), "end at 15"),
        ((q, scale.float(), zero), "scales of quantised rows are torch.float32"),
        ((q, scale[:, :2], zero), r"\[2, 2\] instead of torch.float16 \[2, 3\]"),
        ((q, scale, zero[:1]), r"zero points of quantised rows are torch.uint8 \[1, 3\]"),
        ((q.int(), scale, zero), "elements of quantised rows are torch.int32"),
        ((q, scale, None), "or none for one that has them"),
    )
    for bad, words in cases:
        with pytest.raises(ExportError, match=words):
            pack_rows(*bad, quantized)
