"""What an engine rounds on purpose, done to the reference: so that it can tell what that rounding alone costs.

Products with quantised weights may round their activations to 8 bits, a scale for each block of a row, as ONNX
Runtime's MatMulNBits does at accuracy level 4; KV buffers may hold float16, or 8 bits with a scale for each vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from reference.model import DecoderLayer

MOST = 127
"""The largest 8-bit number that is used: both signs reach as far."""

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rounding:
    """activation_blocks: parameter of each quantised weight, to the elements of its blocks. kv: as in the manifest."""

    activation_blocks: Mapping[str, int] = field(default_factory=dict)
    kv: str = "float32"

    @property
    def kind(self) -> str:
        """The coarsest type that anything is rounded to: a row of the table of tolerances."""
        if self.activation_blocks or self.kv == "int8":
            return "int8"
        return self.kv

    def of(self, parameter: str) -> Round:
        """What happens to the activations that are multiplied with this parameter."""
        block = self.activation_blocks.get(parameter)
        return unrounded if block is None else partial(round_blocks, block=block)

    def apply(self, layer: DecoderLayer, prefix: str) -> None:
        """Make a layer, whose parameters are named with `prefix`, round as the engine does."""
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and (rounded := self.of(f"{prefix}{name}.weight")) is not unrounded:
                module.register_forward_pre_hook(partial(_first, rounded))
        if layer.is_moe:
            layer.moe.round_input = self.of(f"{prefix}moe.gate_proj")
            layer.moe.round_gated = self.of(f"{prefix}moe.down_proj")
        layer.self_attn.round_kv = _STORED[self.kv]


def unrounded(x: Tensor) -> Tensor:
    """As it is."""
    return x


def round_through(dtype: torch.dtype, x: Tensor) -> Tensor:
    """To the nearest number of that type."""
    return x.to(dtype).to(x.dtype)


round_half = partial(round_through, torch.float16)
"""To the nearest float16."""


def round_float8(x: Tensor) -> Tensor:
    """To the nearest e4m3, and to NaN beyond the largest, 448: what torch does there differs between its versions."""
    held = x.abs() <= 464  # half-way to where 480 would be; the tie goes to 448, which is even
    return torch.where(held, round_through(torch.float8_e4m3fn, x), torch.nan)


def round_vectors(x: Tensor) -> Tensor:
    """The last axis to 8-bit numbers with one scale, max|x| / 127."""
    return round_blocks(x, x.shape[-1])


def round_blocks(x: Tensor, block: int) -> Tensor:
    """Each block of the last axis to 8-bit numbers with a scale, max|x| / 127; the last block may be shorter."""
    *leading, columns = x.shape
    padded = nn.functional.pad(x, (0, -columns % block)).reshape(*leading, -1, block)
    scale = padded.abs().amax(dim=-1, keepdim=True) / MOST
    whole = torch.round(padded / torch.where(scale == 0, torch.ones_like(scale), scale))
    rounded: Tensor = (whole * scale).flatten(-2)[..., :columns]
    return rounded


_STORED: dict[str, Round] = {
    "float32": unrounded,
    "float16": round_half,
    "bfloat16": partial(round_through, torch.bfloat16),
    "float8": round_float8,
    "int8": round_vectors,
}
"""By the type of the buffers, what keys and values go through."""


def _first(rounded: Round, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded(inputs[0]), *inputs[1:])
