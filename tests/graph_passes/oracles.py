"""What each plugin op means, in float64 numpy with plain loops; nothing here is shared with graph_passes.

Shapes: B batch, T tokens, S slots, H heads, G KV heads, D head dim, W window, E experts, K experts per token, N tokens,
C hidden size, I intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Array = npt.NDArray[Any]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
}
"""torch's own function for each name of the attribute `activation`."""


def rotary(x: Array, cos: Array, sin: Array, *, interleaved: int) -> Array:
    """Each pair of elements as a complex number times cos + i·sin."""
    out = np.zeros(x.shape)
    half = x.shape[-1] // 2
    for b, h, t, i in np.ndindex(*x.shape[:3], half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = complex(x[b, h, t, first], x[b, h, t, second]) * complex(cos[b, t, i], sin[b, t, i])
        out[b, h, t, first], out[b, h, t, second] = turned.real, turned.imag
    return out


def ring_write(ring: Array, new: Array, start: Array, count: Array) -> Array:
    """One token after the other into slot position mod S; padding goes nowhere."""
    out = ring.astype(np.float64)
    for b in range(ring.shape[0]):
        for t in range(int(count[b])):
            out[b, :, (int(start[b]) + t) % ring.shape[2]] = new[b, :, t]
    return out


def attention(query: Array, key: Array, value: Array, visible: Array, *, scale: float) -> Array:
    """Head by head, query by query, over the visible keys only; NaN where a query sees none."""
    B, H, T, _ = query.shape
    out = np.full((B, H, T, value.shape[3]), np.nan)
    for b, h, t in np.ndindex(B, H, T):
        group = h // (H // key.shape[1])
        seen = np.flatnonzero(visible[b, 0, t])
        if len(seen):
            scores = key[b, group, seen].astype(np.float64) @ query[b, h, t].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[b, h, t] = weights / weights.sum() @ value[b, group, seen].astype(np.float64)
    return out


def ring_mask(start: Array, count: Array, tokens: int, slots: int, window: int) -> Array:
    """Which token sees which slot, found by walking back from the newest position; window 0 has no limit."""
    visible = np.zeros((len(start), 1, tokens, slots), bool)
    for b in range(len(start)):
        last = int(start[b]) + int(count[b]) - 1
        for position in range(last, max(last - slots, -1), -1):
            for t in range(tokens):
                distance = int(start[b]) + t - position
                visible[b, 0, t, position % slots] = distance >= 0 and (window == 0 or distance < window)
    return visible


def gate(logits: Array, *, top_k: int) -> tuple[Array, Array]:
    """Experts by falling probability, the lower number first among equals; weights that sum to one."""
    weight, expert = np.zeros((len(logits), top_k)), np.zeros((len(logits), top_k), np.int64)
    for n, row in enumerate(logits.astype(np.float64)):
        best = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
        odds = [math.exp(row[e] - row[best[0]]) for e in best]
        weight[n], expert[n] = np.array(odds) / sum(odds), best
    return weight, expert


def experts(x: Array, weight: Array, expert: Array, gate: Array, up: Array, down: Array, *, activation: str) -> Array:
    """Each token through the experts that it chose, and no others."""
    out = np.zeros(x.shape)
    wide = [array.astype(np.float64) for array in (gate, up, down)]
    for n, k in np.ndindex(*expert.shape):
        e = int(expert[n, k])
        token = x[n].astype(np.float64)
        active = ACTIVATIONS[activation](torch.from_numpy(wide[0][e] @ token)).numpy()
        out[n] += weight[n, k] * (wide[2][e] @ (active * (wide[1][e] @ token)))
    return out


def gated(gate: Array, up: Array, *, activation: str) -> Array:
    """act(gate) · up in float64."""
    active = ACTIVATIONS[activation](torch.from_numpy(gate.astype(np.float64))).numpy()
    return np.asarray(active * up.astype(np.float64))
