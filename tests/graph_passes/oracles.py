"""What each plugin op means, in float64 numpy with plain loops; nothing here is shared with graph_passes.

Shapes: B batch, T tokens, S slots, H heads, G KV heads, D head dim, W window, E experts, K experts per token, N tokens,
C hidden size, I intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def gated_rounding(
    x: Array, weight: Array, expert: Array, gate: Array, up: Array, down: Array, *, activation: str, block: int
) -> Array:
    """How far `experts` moves at most when the gated numbers of a block are whole multiples of their largest / 127."""
    room = np.zeros(x.shape)
    for n, k in np.ndindex(*expert.shape):
        e = int(expert[n, k])
        token = x[n].astype(np.float64)
        active = ACTIVATIONS[activation](torch.from_numpy(gate[e] @ token)).numpy() * (up[e] @ token)
        for first in range(0, len(active), block):
            step = np.abs(active[first : first + block]).max() / 127
            room[n] += np.abs(weight[n, k]) * np.abs(down[e][:, first : first + block]).sum(-1) * step / 2
    return room


def gated(gate: Array, up: Array, *, activation: str) -> Array:
    """act(gate) · up in float64."""
    active = ACTIVATIONS[activation](torch.from_numpy(gate.astype(np.float64))).numpy()
    return np.asarray(active * up.astype(np.float64))


def rms_norm(x: Array, weight: Array, *, epsilon: float) -> Array:
    """Row by row."""
    out = np.zeros(x.shape)
    for place in np.ndindex(*x.shape[:-1]):
        row = x[place].astype(np.float64)
        out[place] = row / math.sqrt(sum(row * row) / len(row) + epsilon) * weight
    return out


def product(x: Array, weight: Array) -> Array:
    """Each row against each row of the weight."""
    out = np.zeros((*x.shape[:-1], len(weight)))
    for place in np.ndindex(*out.shape):
        out[place] = x[place[:-1]].astype(np.float64) @ weight[place[-1]].astype(np.float64)
    return out


def dequantized(packed: Array, scale: Array, zero: Array | None, *, K: int, bits: int) -> Array:
    """scale · (q − zero) of packed numbers [..., N, blocks, bytes], one after the other, as float64 [..., N, K]."""
    per_byte = 8 // bits
    size = packed.shape[-1] * per_byte
    out = np.zeros((*packed.shape[:-2], K))
    for place in np.ndindex(*out.shape):
        *row, k = place
        block, at = divmod(k, size)

        def number(numbers: Array, index: int) -> int:
            return int(numbers[index // per_byte]) >> (index % per_byte * bits) & ((1 << bits) - 1)

        middle = 1 << (bits - 1) if zero is None else number(zero[tuple(row)], block)
        out[place] = float(scale[(*row, block)]) * (number(packed[(*row, block)], at) - middle)
    return out


def stored_int8(vector: Array) -> tuple[Array, np.float32]:
    """Numbers and scale of one head's vector: float32 arithmetic, ties to even; zeros have a scale of zero."""
    narrow = vector.astype(np.float32)
    scale = np.abs(narrow).max() / np.float32(127)
    return (np.rint(narrow / scale) if scale > 0 else np.zeros_like(narrow)).astype(np.int8), scale


def rolling_attention(
    new: Sequence[Array],
    rings: Sequence[Array],
    start: Array,
    count: Array,
    *,
    scale: float,
    window: int,
    interleaved: int,
) -> list[Array]:
    """Turned, written and attended to, token by token; attended [B, T, H, D] and the rings.

    new: query, key, value, cosine, sine. rings: keys and values, then, of int8, the scales of both.
    """
    query, key, value, cos, sin = new
    presents = [ring.copy() for ring in rings]
    heads_first = [part.transpose(0, 2, 1, 3) for part in (query, key, value)]
    turned_query, turned_key = (rotary(part, cos, sin, interleaved=interleaved) for part in heads_first[:2])
    for which, written in enumerate((turned_key, heads_first[2])):
        for b, g, t in np.ndindex(*written.shape[:3]):
            slot = (int(start[b]) + t) % rings[which].shape[2]
            if t >= count[b]:
                continue
            if len(rings) > 2:
                presents[which][b, g, slot], presents[which + 2][b, g, slot] = stored_int8(written[b, g, t])
            else:
                presents[which][b, g, slot] = written[b, g, t]
    wide = [ring.astype(np.float64) for ring in presents]
    held = [wide[0] * wide[2][..., None], wide[1] * wide[3][..., None]] if len(rings) > 2 else wide
    visible = ring_mask(start, count, query.shape[1], rings[0].shape[2], window)
    attended = attention(turned_query, held[0], held[1], visible, scale=scale)
    return [attended.transpose(0, 2, 1, 3), *presents]
