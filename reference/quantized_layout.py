"""Weights as small integers with a scale per block of a row: the one layout in which Cierzo holds them.

It is that of ONNX Runtime's operator com.microsoft.MatMulNBits
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md), for a matrix [N, K] whose rows lie along
K, the axis that a product sums over:

    element k of a row lies in block k // block_size; the last block may be partial, and is filled with its zero point
    value = scale * (q - zero), with q unsigned: 0 to 15, or 0 to 255
    zero is that of the block, or 8 (4 bits) or 128 (8 bits) where there are no zero points
    two 4-bit numbers share a byte, the first in its low half: elements along a block, zero points along a row's blocks

Symbols: R rows (any number of N's), K columns, B blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
SCALE_TYPES = ("F16", "F32")
"""In the spelling of safetensors."""


@dataclass(frozen=True, slots=True)
class QuantizedFormat:
    """How one matrix is quantised: bits of an element, elements of a block, and what a block has beside them.

    scale: the type of the scales, one of SCALE_TYPES. Raises ExportError for a combination outside of the lists above.
    """

    bits: int
    block_size: int
    zero_points: bool
    scale: str

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("bits", self.bits, BITS),
            ("block_size", self.block_size, BLOCK_SIZES),
            ("scale", self.scale, SCALE_TYPES),
        ):
            if value not in allowed:
                raise ExportError(
                    f"Quantised weights cannot have {name} = {value!r}. "
                    f"Choose one of {', '.join(str(one) for one in allowed)}."
                )

    @property
    def middle(self) -> int:
        """The zero point of a block that has none of its own: 8 or 128."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest q: 15 or 255."""
        return (1 << self.bits) - 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's elements."""
        return self.block_size * self.bits // 8

    def blocks(self, columns: int) -> int:
        """Blocks of a row of `columns` elements, a partial last one included."""
        return -(-columns // self.block_size)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's elements."""
        return self.blocks(columns) * self.block_bytes

    def zero_bytes(self, columns: int) -> int:
        """Bytes of a row's zero points, where the format has them."""
        return -(-self.blocks(columns) * self.bits // 8)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a quantised matrix.

    packed: uint8 [R, B, block_size * bits / 8]. scale: float16 or float32 [R, B].
    zero: uint8 [R, ceil(B * bits / 8)], or None where the format has no zero points.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


def scale_dtype(quantized: QuantizedFormat) -> torch.dtype:
    """torch.float16 or torch.float32."""
    import torch

    return torch.float16 if quantized.scale == "F16" else torch.float32


def pack_rows(
    q_RK: torch.Tensor, scale_RB: torch.Tensor, zero_RB: torch.Tensor | None, quantized: QuantizedFormat
) -> QuantizedRows:
    """The layout's bytes of rows given element by element.

    q_RK: uint8, 0 to `quantized.largest`. scale_RB: of the format's type already, since a cast would change values.
    zero_RB: uint8, or None, as the format says. Raises ExportError for other types, shapes and values.
    """
    import torch

    rows, columns = q_RK.shape
    blocks, size = quantized.blocks(columns), quantized.block_size
    _check("elements", q_RK, (rows, columns), torch.uint8)
    _check("scales", scale_RB, (rows, blocks), scale_dtype(quantized))
    if (zero_RB is not None) != quantized.zero_points:
        raise ExportError("Zero points were given for a format without them, or none for one that has them.")
    if zero_RB is not None:
        _check("zero points", zero_RB, (rows, blocks), torch.uint8)
    if quantized.bits < 8 and any(
        part.numel() and int(part.max()) > quantized.largest for part in (q_RK, zero_RB) if part is not None
    ):
        raise ExportError(f"Quantised weights of {quantized.bits} bits end at {quantized.largest}: check their maker.")
    if columns != blocks * size:
        whole = torch.empty((rows, blocks * size), dtype=torch.uint8)
        whole[:, :columns] = q_RK
        whole[:, columns:] = quantized.middle if zero_RB is None else zero_RB[:, -1:]
        q_RK = whole
    packed = q_RK if quantized.bits == 8 else _halves(q_RK)
    zero = None
    if zero_RB is not None:
        zero = zero_RB if quantized.bits == 8 else _halves(torch.nn.functional.pad(zero_RB, (0, blocks % 2)))
        zero = zero.contiguous()
    return QuantizedRows(packed.reshape(rows, blocks, quantized.block_bytes).contiguous(), scale_RB.contiguous(), zero)


def unpack(rows: QuantizedRows, quantized: QuantizedFormat, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q [R, K] and zero [R, B] of packed rows, both uint8; without zero points the latter is all `quantized.middle`."""
    import torch

    count, blocks = rows.scale.shape
    q_RK = _numbers(rows.packed.flatten(1), quantized.bits)[:, :columns]
    if rows.zero is None:
        return q_RK, torch.full((count, blocks), quantized.middle, dtype=torch.uint8)
    return q_RK, _numbers(rows.zero, quantized.bits)[:, :blocks]


def dequantize(rows: QuantizedRows, quantized: QuantizedFormat, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The values scale * (q - zero) of packed rows, [R, columns] in `dtype`.

    Computed in float64 for float64, in float32 for all others and cast then. The product is exact in either for
    scales of 16 bits, and for all scales in float64.
    """
    import torch

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q_RK, zero_RB = unpack(rows, quantized, columns)
    blocks, size = quantized.blocks(columns), quantized.block_size
    value = q_RK.to(wide)
    if columns != blocks * size:
        value = torch.nn.functional.pad(value, (0, blocks * size - columns))
    value_RBS = value.view(-1, blocks, size)
    value_RBS -= zero_RB[:, :, None]
    value_RBS *= rows.scale[:, :, None].to(wide)
    return value_RBS.view(-1, blocks * size)[:, :columns].to(dtype).contiguous()


def _check(what: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ExportError(
            f"The {what} of quantised rows are {tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(shape)}."
        )


def _halves(numbers: torch.Tensor) -> torch.Tensor:
    """Pairs of 4-bit numbers [R, 2n] as bytes [R, n], the first of each in the low half."""
    return numbers[:, 0::2] | numbers[:, 1::2] << 4


def _numbers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_halves` for 4 bits; bytes themselves for 8."""
    import torch

    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
