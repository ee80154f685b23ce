"""The quantiser of the native library, which gives the same bits as `exporter.quantize.blocks`, a hundred times faster.

A call releases the interpreter, so that threads can share rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from reference.quantized_layout import QuantizedFormat, QuantizedRows, scale_dtype
from runtime.kernels import library_path

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""QuantizerInput of runtime/kernels/cpu/quantizer.h."""

_NOT_FINITE = 1

Function = Callable[..., int]


def native_quantizer() -> Function | None:
    """The library's function, or None where there is no library: then the one in torch runs."""
    path = library_path()
    return None if path is None else _function(path)


@cache
def _function(path: Path) -> Function | None:
    try:
        function = ctypes.CDLL(str(path)).cierzo_quantize_rows
    except (OSError, AttributeError):
        return None
    number, pointer = ctypes.c_int, ctypes.c_void_p
    function.argtypes = [
        pointer, number, ctypes.c_int64, ctypes.c_int64, number, number, number, number, number,
        pointer, pointer, pointer,
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function


def quantize_natively(
    function: Function, values_RK: torch.Tensor, quantized: QuantizedFormat, *, search: bool
) -> QuantizedRows | None:
    """Contiguous rows of a type in TYPES; None when one of the values is not finite.

    A scale that float16 cannot hold comes out infinite.
    """
    rows, columns = values_RK.shape
    count = quantized.blocks(columns)
    packed = torch.empty((rows, count, quantized.block_bytes), dtype=torch.uint8)
    scale = torch.empty((rows, count), dtype=scale_dtype(quantized))
    points = quantized.zero_points
    zero = torch.empty((rows, quantized.zero_bytes(columns)), dtype=torch.uint8) if points else None
    answer = function(
        values_RK.data_ptr(), TYPES[values_RK.dtype], rows, columns, quantized.bits, quantized.block_size, int(points),
        int(quantized.scale == "F16"), int(search), packed.data_ptr(), scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
    )  # fmt: skip
    if answer < 0:
        raise AssertionError(f"the native quantiser does not take {quantized} for rows of {columns}")
    return None if answer & _NOT_FINITE else QuantizedRows(packed, scale, zero)
