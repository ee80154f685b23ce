"""Spellings of attention that differ in how heads are shared, in the products, the softmax, or who does it all."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mistral.modeling_mistral import eager_attention_forward

from tests.graph_passes.gallery.attention import LOWEST, expand_heads, products, spelling, visible

# Shared heads, and the products.


@spelling("repeat_interleave")
def repeat_interleave(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = q @ k.repeat_interleave(2, dim=1).mT * 0.4
    return scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1) @ v.repeat_interleave(2, 1)


@spelling("heads by index")
def heads_by_index(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    heads = torch.tensor([0, 0, 1, 1])
    scores = q @ k[:, heads].mT * 0.4
    return scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1) @ v.index_select(1, heads)


@spelling("stacked copies")
def stacked(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = q @ torch.stack([k, k], 2).flatten(1, 2).mT * 0.4
    return scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1) @ torch.stack([v, v], 2).flatten(1, 2)


@spelling("multi-head, no repeat")
def multi_head(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = q[:, 1:3] @ k.mT * 0.4
    return scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1) @ v


@spelling("multi-query, by broadcasting")
def multi_query(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = q @ k[:, 1:].mT * 0.4
    return scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1) @ v[:, 1:]


@spelling("grouped einsum")
def grouped_einsum(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, H, T, D = q.shape
    scores = torch.einsum("bhgtd,bhsd->bhgts", q.view(B, 2, 2, T, D), k) * 0.4
    weights = (scores + torch.where(visible(q, k, start, count), 0.0, LOWEST)[:, None]).softmax(-1)
    return torch.einsum("bhgts,bhsd->bhgtd", weights, v).reshape(B, H, T, D)


@spelling("grouped einsum, tokens first")
def grouped_tokens_first(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, _, T, D = q.shape
    query, key, value = q.transpose(1, 2).reshape(B, T, 2, 2, D), k.transpose(1, 2), v.transpose(1, 2)
    scores = torch.einsum("btgrd,bsgd->bgrts", query, key) * 0.4
    weights = scores.masked_fill(~visible(q, k, start, count)[:, :, None], LOWEST).softmax(-1)
    return torch.einsum("bgrts,bsgd->btgrd", weights, value).flatten(2, 3)


@spelling("grouped matmul, turned and joined")
def grouped_turned(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, H, T, D = q.shape
    scores = q.view(B, 2, 2, T, D) @ k[:, :, None].mT * 0.4
    weights = scores.masked_fill(~visible(q, k, start, count)[:, :, None], LOWEST).softmax(-1)
    return (weights @ v[:, :, None]).permute(0, 3, 1, 2, 4).reshape(B, T, H * D).view(B, T, H, D)


@spelling("grouped matmul")
def grouped_matmul(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, H, T, D = q.shape
    scores = q.view(B, 2, 2, T, D) @ k.unsqueeze(2).transpose(-1, -2) * 0.4
    weights = torch.where(visible(q, k, start, count).unsqueeze(1), scores, LOWEST).softmax(-1)
    return (weights @ v.unsqueeze(2)).reshape(B, H, T, D)


@spelling("einsum")
def plain_einsum(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = torch.einsum("bhtd,bhsd->bhts", q, expand_heads(k)) * 0.4
    weights = scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1)
    return torch.einsum("bhts,bhsd->bhtd", weights, expand_heads(v))


@spelling("einsum with tokens before heads")
def tokens_first(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key, value = q.transpose(1, 2), expand_heads(k).transpose(1, 2), expand_heads(v).transpose(1, 2)
    scores = torch.einsum("bthd,bshd->bhts", query, key) * 0.4
    weights = scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, value)


@spelling("bmm over rows and heads at once")
def bmm(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, H, T, D = q.shape
    S = k.shape[2]
    bias = torch.zeros(B, 1, T, S).masked_fill(~visible(q, k, start, count), -math.inf)
    key, value = expand_heads(k).reshape(B * H, S, D), expand_heads(v).reshape(B * H, S, D)
    scores = torch.bmm(q.reshape(B * H, T, D), key.transpose(1, 2)) * 0.4
    weights = (scores + bias.expand(B, H, T, S).reshape(B * H, T, S)).softmax(-1)
    return torch.bmm(weights, value).view(B, H, T, D)


@spelling("baddbmm with the mask as its addend")
def baddbmm(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, H, T, D = q.shape
    S = k.shape[2]
    bias = torch.where(visible(q, k, start, count), 0.0, -1e9).expand(B, H, T, S).reshape(B * H, T, S)
    key, value = expand_heads(k).reshape(B * H, S, D), expand_heads(v).reshape(B * H, S, D)
    weights = torch.baddbmm(bias, q.reshape(B * H, T, D), key.mT, alpha=0.4).softmax(-1)
    return torch.bmm(weights, value).view(B, H, T, D)


@spelling("keys times queries, transposed")
def keys_times_queries(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = (expand_heads(k) @ q.mT).mT * 0.4
    weights = scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1)
    return (expand_heads(v).mT @ weights.mT).mT


@spelling("sum of elementwise products")
def elementwise(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = (q[:, :, :, None] * expand_heads(k)[:, :, None]).sum(-1) * 0.4
    weights = scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1)
    return (weights[..., None] * expand_heads(v)[:, :, None]).sum(3)


# The softmax.


@spelling("softmax in float32 and back")
def softmax_float32(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    masked = torch.where(visible(q, k, start, count), products(q, k) * 0.4, LOWEST)
    return F.softmax(masked, dim=-1, dtype=torch.float32).to(q.dtype) @ expand_heads(v)


@spelling("exp over its sum")
def decomposed(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    masked = torch.where(visible(q, k, start, count), products(q, k) * 0.4, LOWEST)
    power = torch.exp(masked - masked.amax(-1, keepdim=True))
    return power / power.sum(-1, keepdim=True) @ expand_heads(v)


@spelling("dropout that is off")
def idle_dropout(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    masked = torch.where(visible(q, k, start, count), products(q, k) * 0.4, LOWEST)
    return F.dropout(masked.softmax(-1), 0.1, training=False) @ expand_heads(v)


# scaled_dot_product_attention, and transformers.


@spelling("sdpa with a bool mask, as transformers sdpa")
def transformers_sdpa(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    mask = visible(q, k, start, count)
    key, value = expand_heads(k).contiguous(), expand_heads(v).contiguous()
    attended = F.scaled_dot_product_attention(q.contiguous(), key, value, attn_mask=mask, scale=0.4, is_causal=False)
    return attended.transpose(1, 2).contiguous()


@spelling("sdpa with a float mask", 6**-0.5)
def sdpa_float(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    bias = torch.where(visible(q, k, start, count), 0.0, -math.inf)
    return F.scaled_dot_product_attention(q, expand_heads(k), expand_heads(v), attn_mask=bias)


@spelling("sdpa with enable_gqa", 6**-0.5)
def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(q, k, start, count), enable_gqa=True)


@spelling("sdpa of a scaled query", 0.4 * 6**-0.5)
def sdpa_scaled(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    seen = visible(q, k, start, count).expand(-1, 4, -1, -1)
    return F.scaled_dot_product_attention(q * 0.4, expand_heads(k), expand_heads(v), attn_mask=seen)


@spelling("as transformers eager")
def transformers_eager(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    mask = torch.where(visible(q, k, start, count), 0.0, LOWEST)
    weights = torch.matmul(q, expand_heads(k).transpose(2, 3)) * 0.4
    weights = weights + mask[:, :, :, : k.shape[-2]]
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, expand_heads(v)).transpose(1, 2).contiguous()


LAYER: Any = SimpleNamespace(num_key_value_groups=2, training=False, is_causal=True)
"""What transformers' functions ask of the layer that calls them."""


@spelling("transformers' own eager function")
def eager_function(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    mask = torch.where(visible(q, k, start, count), 0.0, LOWEST)
    attended: Tensor = eager_attention_forward(LAYER, q, k, v, mask, scaling=0.4, dropout=0.0)[0]
    return attended


@spelling("transformers' own sdpa function")
def sdpa_function(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    mask = visible(q, k, start, count)
    attended: Tensor = sdpa_attention_forward(LAYER, q, k, v, mask, scaling=0.4, sliding_window=5)[0]
    return attended


@spelling("transformers' own sdpa function with a float mask")
def sdpa_function_float(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    mask = torch.where(visible(q, k, start, count), 0.0, LOWEST)
    attended: Tensor = sdpa_attention_forward(LAYER, q, k, v, mask, scaling=0.4)[0]
    return attended
