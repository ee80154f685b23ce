"""The quantiser in torch, block by block: what runs without the native library, and what that is held against.

A weight of a block becomes scale · (q - zero), q a whole number of 4 or 8 bits. Both methods round the scale to the
type that it is stored in first, and choose the numbers for the rounded one, by division.

    rtn     round to nearest. The scale maps the weight of largest magnitude to the far end of the range, -8 or -128
            (it is negative where that weight is positive, and so no number is left unused); with zero points it maps
            the block's range, zero included, to all of it.
    search  of ten ranges, from a little wider than the weights' own to one that clips them, the one whose numbers
            leave the least squared error once the scale is fitted to them by least squares, ⟨w, q⟩ / ⟨q, q⟩; numbers
            and scale are then fitted to each other twice more. Where rtn is better, it is rtn.

runtime/kernels/cpu/quantizer_blocks.h does the same, operation by operation and in the same order, so that the bits
are the same: sums run over a block's elements one after the other, and no product is contracted with a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference.quantized_layout import QuantizedFormat, scale_dtype

CANDIDATES = 10
FIRST_SYMMETRIC, FIRST_ASYMMETRIC, APART = -1.5, -2.5, 0.5
"""Steps of each candidate's range beside those that the numbers have. See benchmarks/results/quantization.md."""

_ROUNDER = 12582912.0  # 1.5 · 2²³: a sum with it has no fraction
_LEAST_EXPONENT, _MOST_EXPONENT = 0x00800000, 0x7E800000


@dataclass(frozen=True, slots=True)
class QuantizedBlocks:
    """n blocks: q uint8 [n, S]; scale [n] of the format's type; zero uint8 [n], or None as the format says."""

    q_nS: Tensor
    scale_n: Tensor
    zero_n: Tensor | None


def quantize_blocks(weights_nS: Tensor, quantized: QuantizedFormat, *, search: bool) -> QuantizedBlocks:
    """Blocks of finite weights, float32 [n, S], by one of the two methods; S is the format's block size.

    A scale that float16 cannot hold comes out infinite, for the caller to refuse.
    """
    return _Quantizer(weights_nS, quantized).run(search)


def _where_zero(value: Tensor, yes: float | Tensor, no: Tensor) -> Tensor:
    return torch.where(value == 0, torch.as_tensor(yes, dtype=no.dtype), no)


def _summed(values_Sn: Tensor) -> Tensor:
    """The sum over a block, element after element."""
    total = torch.zeros_like(values_Sn[0])
    for values_n in values_Sn:
        total += values_n
    return total


class _Quantizer:
    """One set of blocks on its way, normalised by a power of two so that no square overflows or vanishes."""

    def __init__(self, weights_nS: Tensor, quantized: QuantizedFormat) -> None:
        self._format = quantized
        self._half, self._top = float(quantized.middle), float(quantized.largest)
        points = quantized.zero_points
        self._least, self._most = (0.0, self._top) if points else (-self._half, self._half - 1)
        self._steps = self._top if points else self._half
        weights_Sn = weights_nS.T.contiguous()
        low = high = extreme = torch.zeros_like(weights_Sn[0])
        for weight in weights_Sn:
            low, high = torch.minimum(weight, low), torch.maximum(weight, high)
            extreme = torch.where(weight.abs() > extreme.abs(), weight, extreme)
        exponent = (extreme.abs().view(torch.int32) & 0x7F800000).clamp(_LEAST_EXPONENT, _MOST_EXPONENT)
        self._up, down = exponent.view(torch.float32), (0x7F000000 - exponent).view(torch.float32)
        self._down = down
        self._weights_Sn = weights_Sn * down
        self._low = low * down
        self._span = high * down - self._low if points else 0 - extreme * down
        self._best = (torch.zeros_like(low),) * 3  # what it explains of the sum of squares, scale, zero point

    def run(self, search: bool) -> QuantizedBlocks:
        scale, zero = self._nearest()
        if search:
            self._search()
            _, found, point = self._best
            found = self._stored(found)
            worse = self._squared_error(found, point) > self._squared_error(scale, zero)
            scale, zero = torch.where(worse, scale, found), torch.where(worse, zero, point)
        shift = zero if self._format.zero_points else torch.full_like(zero, self._half)
        q_Sn = _where_zero(scale, 0.0, self._numbers(scale, zero)) + shift
        return QuantizedBlocks(
            q_Sn.T.contiguous().to(torch.uint8),
            (scale * self._up).to(scale_dtype(self._format)),
            zero.to(torch.uint8) if self._format.zero_points else None,
        )

    def _nearest(self) -> tuple[Tensor, Tensor]:
        scale = self._stored(self._span / self._steps)
        if not self._format.zero_points:
            return scale, torch.zeros_like(scale)
        point = self._whole((0 - self._low) / _where_zero(scale, 1.0, scale), 0.0)
        return scale, _where_zero(scale, 0.0, point)

    def _search(self) -> None:
        divisor = _where_zero(self._span, 1.0, self._span)
        for candidate in range(CANDIDATES):
            more = (FIRST_ASYMMETRIC if self._format.zero_points else FIRST_SYMMETRIC) + APART * candidate
            inverse = torch.full_like(divisor, self._steps + more) / divisor
            point = torch.zeros_like(inverse)
            if self._format.zero_points:  # what is clipped is clipped from both ends alike
                point = self._whole((0 - self._low) * inverse - more * 0.5, 0.0)
            self._consider(inverse, point)
        for _ in range(2):
            scale, point = self._best[1:]
            self._consider(_where_zero(scale, 0.0, 1 / scale), point)

    def _consider(self, inverse: Tensor, point: Tensor) -> None:
        q_Sn = self._whole(self._weights_Sn * inverse, point)
        qq = _summed(q_Sn * q_Sn)
        xq = _summed(q_Sn.mul_(self._weights_Sn))
        scale = xq / qq
        found = (xq * scale, scale, point)
        better = found[0] > self._best[0]  # never so where no number is but 0
        old = self._best
        self._best = (
            torch.where(better, found[0], old[0]),
            torch.where(better, found[1], old[1]),
            torch.where(better, found[2], old[2]),
        )

    def _squared_error(self, scale: Tensor, point: Tensor) -> Tensor:
        missed_Sn = self._weights_Sn - scale * self._numbers(scale, point)
        return _summed(missed_Sn * missed_Sn)

    def _numbers(self, scale: Tensor, point: Tensor) -> Tensor:
        """q - zero of every weight, [S, n]."""
        return self._whole(self._weights_Sn / _where_zero(scale, 1.0, scale), point)

    def _whole(self, values: Tensor, point: Tensor | float) -> Tensor:
        """The nearest whole number that can be had beside the zero point, ties to even."""
        inside = torch.maximum(
            torch.minimum(values, torch.as_tensor(self._most - point)), torch.as_tensor(self._least - point)
        )
        return inside.add_(_ROUNDER).sub_(_ROUNDER)

    def _stored(self, scale: Tensor) -> Tensor:
        """The normalised scale as its type holds it."""
        return (scale * self._up).to(scale_dtype(self._format)).float() * self._down
