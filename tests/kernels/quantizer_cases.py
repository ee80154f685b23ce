"""The native quantiser against the one in torch: the same bits, for every format, input type and odd row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from exporter.quantize import rows
from exporter.quantize.native import native_quantizer, quantize_natively
from reference.quantized_layout import BITS, BLOCK_SIZES, SCALE_TYPES, QuantizedFormat, QuantizedRows
from tests.support.kernels import main

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def odd_rows(columns: int, dtype: torch.dtype, scale: str) -> torch.Tensor:
    """Rows of very different magnitudes, of zeros, of one sign, of ties, of whole numbers, of one weight that is large.

    With float32 throughout also such that their squares overflow or vanish.
    """
    generator = torch.Generator().manual_seed(columns)
    made = torch.randn(37, columns, generator=generator)
    made *= torch.exp(2 * torch.randn(37, 1, generator=generator)).clamp(max=500)
    made[0] = 0
    made[1, ::2] = 0
    made[2] = made[2].abs()
    made[3] = -made[3].abs()
    made[4] = 0.5
    made[5] = -3e-7
    made[6, 1:] = 0
    made[7] = made[7].round()
    made[8] = torch.arange(columns) % 17 - 8.0
    made[9] = (torch.arange(columns) % 31 - 15.0) / 2
    if scale == "F32" and dtype != torch.float16:
        made[10] *= 1e30
        made[11] *= 1e-30
        made[12] *= 1e-41
        made[13, 0] = 3e38
    return made.to(dtype)


def formats() -> Iterator[QuantizedFormat]:
    for bits in BITS:
        for block_size in BLOCK_SIZES:
            for zero_points in (False, True):
                for scale in SCALE_TYPES:
                    yield QuantizedFormat(bits, block_size, zero_points, scale)


def in_torch(values: torch.Tensor, quantized: QuantizedFormat, search: bool) -> QuantizedRows | None:
    return rows._in_torch(values.float(), quantized, search)


def natively(values: torch.Tensor, quantized: QuantizedFormat, search: bool) -> QuantizedRows | None:
    function = native_quantizer()
    assert function is not None
    return quantize_natively(function, values, quantized, search=search)


def same_bits(columns: int, dtype: torch.dtype) -> None:
    for quantized in formats():
        values = odd_rows(columns, dtype, quantized.scale)
        for search in (False, True):
            expected, found = in_torch(values, quantized, search), natively(values, quantized, search)
            assert expected is not None
            assert found is not None
            what = f"{quantized}, search {search}"
            assert torch.equal(found.scale.view(torch.uint8), expected.scale.view(torch.uint8)), what
            assert torch.equal(found.packed, expected.packed), what
            if quantized.zero_points:
                assert found.zero is not None
                assert expected.zero is not None
                assert torch.equal(found.zero, expected.zero), what


def not_finite_is_seen(dtype: torch.dtype) -> None:
    quantized = QuantizedFormat(4, 32, False, "F16")
    for bad in (float("inf"), float("-inf"), float("nan")):
        for row, column in ((0, 0), (36, 69), (20, 64)):
            values = odd_rows(70, dtype, "F16")
            values[row, column] = bad
            assert natively(values, quantized, True) is None, (bad, row, column)
            assert in_torch(values, quantized, True) is None, (bad, row, column)


def overflow_is_infinite() -> None:
    values = torch.ones(3, 32)
    values[1] = 1e6
    for zero_points in (False, True):
        quantized = QuantizedFormat(4, 32, zero_points, "F16")
        found, expected = natively(values, quantized, True), in_torch(values, quantized, True)
        assert found is not None
        assert expected is not None
        for made in (found, expected):
            assert made.scale.isinf().flatten().tolist() == [False, True, False]


def no_rows() -> None:
    found = natively(torch.empty(0, 40), QuantizedFormat(8, 16, True, "F32"), True)
    assert found is not None
    assert found.packed.shape == (0, 3, 16)


CASES: dict[str, Callable[[], None]] = {
    **{
        f"{columns} columns of {dtype}": partial(same_bits, columns, dtype)
        for columns in (1, 17, 300)
        for dtype in DTYPES
    },
    **{f"not finite, {dtype}": partial(not_finite_is_seen, dtype) for dtype in DTYPES},
    "a scale beyond float16": overflow_is_infinite,
    "no rows": no_rows,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(CASES)
