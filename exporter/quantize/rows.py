"""Quantises rows of weights, in the native library where there is one, and refuses what the format cannot hold."""

from __future__ import annotations

import math

import torch

from exporter.quantize.blocks import quantize_blocks
from exporter.quantize.native import TYPES, native_quantizer, quantize_natively
from reference.quantized_layout import QuantizedFormat, QuantizedRows, pack_rows
from runtime.errors import ExportError

LARGEST_HALF, SMALLEST_NORMAL_HALF = 65504.0, 2.0**-14
_BLOCKS_AT_ONCE = 1 << 16


def quantize_rows(values_RK: torch.Tensor, quantized: QuantizedFormat, *, search: bool) -> QuantizedRows | None:
    """Rows of weights of any floating type, quantised; None when a value is not finite (as float32).

    search: one of the methods of `exporter.quantize.blocks`, which says what each does. A scale that float16 cannot
    hold comes out infinite; see `ScaleCheck`.
    """
    if values_RK.dtype not in TYPES:
        values_RK = values_RK.to(torch.float32)
    if values_RK.numel() == 0:
        values_RK = values_RK.reshape(0, values_RK.shape[1])
    function = native_quantizer()
    if function is not None:
        return quantize_natively(function, values_RK.contiguous(), quantized, search=search)
    return _in_torch(values_RK.to(torch.float32), quantized, search)


def _in_torch(values_RK: torch.Tensor, quantized: QuantizedFormat, search: bool) -> QuantizedRows | None:
    if not bool(values_RK.isfinite().all()):
        return None
    rows, columns = values_RK.shape
    count, size = quantized.blocks(columns), quantized.block_size
    whole = torch.nn.functional.pad(values_RK, (0, count * size - columns)).view(rows * count, size)
    parts = [quantize_blocks(part, quantized, search=search) for part in torch.split(whole, _BLOCKS_AT_ONCE)]
    zero = None
    if quantized.zero_points:
        zero = torch.cat([part.zero_n for part in parts if part.zero_n is not None]).view(rows, count)
    q_RK = torch.cat([part.q_nS for part in parts]).view(rows, count * size)[:, :columns]
    return pack_rows(q_RK, torch.cat([part.scale_n for part in parts]).view(rows, count), zero, quantized)


class ScaleCheck:
    """Sees the scales of one tensor as they come, and refuses a tensor whose scales their type holds badly or not."""

    def __init__(self, parameter: str, quantized: QuantizedFormat) -> None:
        self._parameter, self._format = parameter, quantized
        self._largest = 0.0
        self._vanished = False

    def see(self, scale: torch.Tensor, *, vanished: bool = False) -> None:
        """Raises ExportError for a scale that is infinite. vanished: all are 0, and not all of the weights."""
        if self._format.scale == "F16" and scale.numel():
            self._vanished |= vanished
            self._largest = max(self._largest, float(scale.abs().max()))
            if math.isinf(self._largest):
                raise ExportError(
                    f"{self._parameter} has weights so large that scales of float16, which end at "
                    f"{LARGEST_HALF:.0f}, cannot hold theirs. Pass --scales float32 (scales='float32')."
                )

    def finish(self) -> None:
        """Raises ExportError when every scale was below the smallest that float16 holds to its full 11 bits.

        What lies below half of float16's smallest number has become 0, and the matrix with it.
        """
        if (self._largest > 0.0 or self._vanished) and self._largest < SMALLEST_NORMAL_HALF:
            raise ExportError(
                f"{self._parameter} has weights so small that all its scales lie below {SMALLEST_NORMAL_HALF:.1e}, "
                "where float16 loses digits and then everything. Pass --scales float32 (scales='float32')."
            )
