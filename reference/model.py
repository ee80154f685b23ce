"""The decoder in plain PyTorch: the oracle that every engine is held against.

It reads the whole context at once and knows nothing of rings, chunks or caches. Parameters are left empty here
(`reference.weights` fills them), so that a model can stand on the meta device or be filled layer by layer.

Shapes: B batch, T tokens, N = B·T, C hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.attention import Attention, attend, visible_pairs
from reference.config import ModelConfig
from reference.moe import GatedMLP, MixtureOfExperts
from reference.norm import RMSNorm
from reference.rope import RotaryAngles
from runtime.errors import InputError

QUERIES_AT_ONCE = 512


def refuse_beyond_limit(config: ModelConfig, tokens: int) -> None:
    """Raise InputError for a row of so many tokens when the model's position_limit ends before."""
    if config.position_limit is not None and tokens > config.position_limit:
        raise InputError(
            f"A row has {tokens:,} tokens, and with RoPE of type {config.rope.type} this model is a fixed function of "
            f"its tokens up to position {config.position_limit:,} only: beyond, every token changes how all earlier "
            "ones are turned. Use shorter rows."
        )


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm. How they are joined is the subclass's: full context or ring."""

    def __init__(
        self, config: ModelConfig, index: int, *, device: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.window = config.layer_windows[index]
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, device=device, dtype=dtype)
        self.self_attn = Attention(config, device=device, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, device=device, dtype=dtype)
        self.is_moe = config.moe is not None
        if config.moe is None:
            self.mlp = GatedMLP(config, device=device, dtype=dtype)
        else:
            self.moe = MixtureOfExperts(config, config.moe, device=device, dtype=dtype)


class ContextLayer(DecoderLayer):
    """A decoder layer over whole rows."""

    def forward(self, x_NC: Tensor, position_BT: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
        B, T = position_BT.shape
        query, key, value = self.self_attn.project(self.input_layernorm(x_NC), B, T)
        query, key = self.self_attn.place(query, key, position_BT, cos_BTd, sin_BTd)
        key, value = self.self_attn.round_kv(key), self.self_attn.round_kv(value)
        blocks = []
        for begin in range(0, T, QUERIES_AT_ONCE):  # scores of all pairs of a long row would not fit into memory
            some = slice(begin, begin + QUERIES_AT_ONCE)
            visible = visible_pairs(position_BT[:, some], position_BT, self.window)
            blocks.append(attend(query[:, :, some], key, value, visible, self.self_attn.scale))
        x_NC = x_NC + self.self_attn.combine(torch.cat(blocks, dim=2))
        feed_forward = self.moe if self.is_moe else self.mlp
        out_NC: Tensor = x_NC + feed_forward(self.post_attention_layernorm(x_NC))
        return out_NC


class Decoder(nn.Module):
    """Embedding, L layers of `layer_class`, final norm, and the head (the embedding again when tied)."""

    layer_class: type[DecoderLayer]

    def __init__(self, config: ModelConfig, *, device: str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.rotary = RotaryAngles(config.rope, config.head_dim)
        self.layers = nn.ModuleList(
            self.layer_class(config, index, device=device, dtype=dtype) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def logits(self, x_NC: Tensor) -> Tensor:
        """Logits [N, V] of the last layer's hidden states."""
        logits_NV: Tensor = self.lm_head(self.norm(x_NC))
        return logits_NV


class Model(Decoder):
    """The oracle."""

    layer_class = ContextLayer

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of whole rows that start at position 0, in the parameters' dtype.

        Raises InputError for rows beyond the config's position_limit.
        """
        B, T = input_ids_BT.shape
        refuse_beyond_limit(self.config, T)
        position_BT = torch.arange(T, device=input_ids_BT.device).expand(B, T)
        x_NC = self.embed_tokens(input_ids_BT).view(B * T, -1)
        cos_BTd, sin_BTd = self.rotary(position_BT, x_NC.dtype)
        for layer in self.layers:
            x_NC = layer(x_NC, position_BT, cos_BTd, sin_BTd)
        return self.logits(x_NC).view(B, T, self.config.vocab_size)
