"""How a weight lies in its file, as far as the graph has to know."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

TYPES = {"F32": ir.DataType.FLOAT, "BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16, "U8": ir.DataType.UINT8}
"""Stored types that a graph can read, as safetensors spells them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Whole, in `dtype`: "F32", "BF16" or "F16"."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Quantized:
    """In the layout of QuantizedMatMul. scale: "F16" or "F32"."""

    bits: int
    block_size: int
    zero_points: bool
    scale: str


LinearFormat = Stored | Quantized


def packed_name(parameter: str) -> str:
    """The initializer that holds a quantised parameter's numbers."""
    return f"{parameter}.packed"


def scale_name(parameter: str) -> str:
    """The initializer that holds its scales."""
    return f"{parameter}.scale"


def zero_name(parameter: str) -> str:
    """The initializer that holds its zero points."""
    return f"{parameter}.zero"
