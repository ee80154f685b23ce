"""Rotary position embedding.

Shapes: B batch, H heads, T tokens, D head dim, d = D/2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reference.config import QueryScaling, RopeConfig
from reference.norm import at_least_float32


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """θ^(−2i/D) for i = 0 … D/2 − 1, float32 [d] (Su et al. 2021, arXiv:2104.09864), stretched as `rope.type` says.

    The arithmetic is float32 step by step, since that is what the checkpoints were trained with: an inverse frequency
    that is off by one rounding turns a late position visibly. Sources of the stretched types: `reference.rope_config`.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequency = rope.theta**exponent
    return _STRETCHED[rope.type](frequency, rope, head_dim)


def _default(frequency: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    return 1.0 / frequency


def _linear(frequency: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    return 1.0 / frequency / rope.factor


def _llama3(frequency: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Wavelengths past the first training's length are stretched, short ones kept, those between blended."""
    inverse = 1.0 / frequency
    length = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    blend = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * inverse / rope.factor + blend * inverse
    stretched = torch.where(wavelength > length / rope.low_freq_factor, inverse / rope.factor, blended)
    return torch.where(wavelength < length / rope.high_freq_factor, inverse, stretched)


def _yarn(frequency: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Dimensions that turn often within the first training's length are kept, slow ones stretched, with a ramp."""

    def dimension(turns: float) -> float:
        positions_per_radian = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(positions_per_radian) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    stretched_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept_share = 1 - stretched_share
    return (1.0 / (rope.factor * frequency)) * (1 - kept_share) + (1.0 / frequency) * kept_share


# Dynamic RoPE is the default one up to `ModelConfig.position_limit`, where it ends.
_STRETCHED = {"default": _default, "dynamic": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


class RotaryAngles(nn.Module):
    """Cosine and sine of position · frequency, times yarn's attention factor.

    The angle itself is float32 by definition: the checkpoints were trained on it. Only its cosine and sine are taken
    in the working precision, and so a float64 run differs from a float32 run by rounding alone, at any position.
    """

    inverse_frequency_d: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.attention_factor = rope.attention_factor
        self.register_buffer("inverse_frequency_d", inverse_frequencies(rope, head_dim), persistent=False)

    def forward(self, position_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, T, d] of absolute positions, in `dtype` or float32, whichever is wider."""
        angle_BTd = position_BT[..., None].to(torch.float32) * self.inverse_frequency_d
        angle_BTd = angle_BTd.to(torch.promote_types(dtype, torch.float32))
        if self.attention_factor == 1.0:
            return angle_BTd.cos(), angle_BTd.sin()
        return angle_BTd.cos() * self.attention_factor, angle_BTd.sin() * self.attention_factor


def query_factor(position_BT: Tensor, scaling: QueryScaling, dtype: torch.dtype) -> Tensor:
    """1 + beta · ln(1 + floor(p / length)) of absolute positions p, [B, 1, T, 1] in `dtype`, taken in float32 or wider.

    Queries that far behind the first training's length attend more sharply (Llama 4; Ministral 3). The quotient is one
    of integers, so that it is exact at any position.
    """
    passed_BT = torch.div(position_BT, scaling.length, rounding_mode="floor")
    wide_BT = passed_BT.to(torch.promote_types(dtype, torch.float32))
    factor_BT = 1 + scaling.beta * torch.log(1 + wide_BT)
    return factor_BT.to(dtype)[:, None, :, None]


def rotate(x_BHTD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Turns element i against element i + D/2 by the position's i-th angle, in float32 or better.

    This is the half-split layout of Hugging Face checkpoints. Mistral's own files pair neighbours (2i, 2i + 1);
    the checkpoint reader permutes those weights, so that only one layout exists from here on.
    """
    half = x_BHTD.shape[-1] // 2
    wide_BHTD = at_least_float32(x_BHTD)
    low, high = wide_BHTD[..., :half], wide_BHTD[..., half:]
    cos, sin = cos_BTd[:, None], sin_BTd[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_BHTD.dtype)
