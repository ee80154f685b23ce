"""Grouped-query attention over a causal, optionally sliding, window.

Shapes: B batch, T tokens, S keys, H query heads, G key and value heads (H is a multiple of G), D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reference.config import ModelConfig
from reference.norm import RMSNorm, at_least_float32
from reference.rope import query_factor, rotate


def visible_pairs(query_position_BT: Tensor, key_position_BS: Tensor, window: int | None) -> Tensor:
    """Which key each query may see, bool [B, 1, T, S].

    Token i sees token j when 0 ≤ i − j < window: the current token counts, as in Hugging Face's `sliding_window`
    (Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825). A key at a negative position is an
    empty place and is seen by nobody.
    """
    query = query_position_BT[:, None, :, None]
    key = key_position_BS[:, None, None, :]
    visible = (key >= 0) & (key <= query)
    if window is not None:
        visible = visible & (query - key < window)
    return visible


def repeat_heads(x_BGSD: Tensor, times: int) -> Tensor:
    """Every key or value head serves `times` neighbouring query heads: [B, G, S, D] to [B, G·times, S, D]."""
    if times == 1:
        return x_BGSD
    B, G, S, D = x_BGSD.shape
    return x_BGSD[:, :, None].expand(B, G, times, S, D).reshape(B, G * times, S, D)


def attend(query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, visible_B1TS: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ where visible) V, [B, H, T, D] (Ainslie et al. 2023, arXiv:2305.13245, for the grouping).

    The softmax runs in float32 or better. Hidden scores are the lowest finite number, not −∞: their weight is exactly
    zero all the same, and a row that sees nothing (padding) stays finite instead of becoming NaN.
    """
    times = query_BHTD.shape[1] // key_BGSD.shape[1]
    key_BHSD, value_BHSD = repeat_heads(key_BGSD, times), repeat_heads(value_BGSD, times)
    scores_BHTS = at_least_float32(torch.matmul(query_BHTD, key_BHSD.transpose(2, 3)) * scale)
    lowest = torch.finfo(scores_BHTS.dtype).min
    weights_BHTS = torch.softmax(torch.where(visible_B1TS, scores_BHTS, lowest), dim=-1)
    return torch.matmul(weights_BHTS.to(query_BHTD.dtype), value_BHSD)


class Attention(nn.Module):
    """The four projections, and how queries and keys learn their positions.

    What happens between that and the output projection is the caller's: full context or ring.
    """

    def __init__(self, config: ModelConfig, *, device: str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.query_scaling = config.query_scaling
        self.round_kv: Callable[[Tensor], Tensor] = lambda x: x  # see reference.rounding
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(hidden, query_size, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias, device=device, dtype=dtype)
        self.has_norms = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, device=device, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, device=device, dtype=dtype)
        self.o_proj = nn.Linear(query_size, hidden, bias=config.output_bias, device=device, dtype=dtype)

    def project(self, x_NC: Tensor, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, T, D], key and value [B, G, T, D] of N = B·T hidden states, before rotation."""
        query, key, value = (
            linear(x_NC).view(batch, tokens, -1, self.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def place(
        self, query_BHTD: Tensor, key_BGTD: Tensor, position_BT: Tensor, cos_BTd: Tensor, sin_BTd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions, queries also scaled by them where the model does that.

        Scaling comes first, which is the same since turning is linear, and leaves turning next to attention.
        """
        if self.query_scaling is not None:
            query_BHTD = query_BHTD * query_factor(position_BT, self.query_scaling, query_BHTD.dtype)
        return rotate(query_BHTD, cos_BTd, sin_BTd), rotate(key_BGTD, cos_BTd, sin_BTd)

    def combine(self, heads_BHTD: Tensor) -> Tensor:
        """Heads side by side through the output projection, [N, C]."""
        B, H, T, D = heads_BHTD.shape
        out: Tensor = self.o_proj(heads_BHTD.transpose(1, 2).reshape(B * T, H * D))
        return out
