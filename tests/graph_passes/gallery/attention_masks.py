"""Spellings of attention that differ in the mask and in where the scale stands."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graph_passes.ops.sliding_window_attention import FULL
from tests.graph_passes.gallery.attention import (
    LOWEST,
    WINDOW,
    expand_heads,
    held_positions,
    mixed,
    positions,
    products,
    spelling,
    visible,
)

# Masks that are chosen.


@spelling("where, the lowest number")
def where_lowest(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count), products(q, k) * 0.4, LOWEST), v)


@spelling("masked_fill with minus infinity")
def masked_fill_infinity(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed((products(q, k) * 0.4).masked_fill(~visible(q, k, start, count), -math.inf), v)


@spelling("masked_fill where a float mask is zero")
def masked_fill_zero(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed((products(q, k) * 0.4).masked_fill(visible(q, k, start, count).float() == 0, -1e9), v)


@spelling("where with a tensor of low numbers")
def where_full(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = products(q, k) * 0.4
    return mixed(torch.where(visible(q, k, start, count), scores, torch.full_like(scores, -1e30)), v)


# Masks that are added.


@spelling("added where of zero and minus infinity")
def added_where(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k) * 0.4 + torch.where(visible(q, k, start, count), 0.0, -math.inf), v)


@spelling("added zeros, filled where hidden")
def added_zeros(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    bad = ~visible(q, k, start, count)
    return mixed(torch.zeros(bad.shape).masked_fill(bad, -math.inf) + products(q, k) * 0.4, v)


@spelling("added (1 - visible) * -1e9")
def added_inverted(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k) * 0.4 + (1 - visible(q, k, start, count).float()) * -1e9, v)


@spelling("added (1 - visible) * the lowest number")
def added_inverted_lowest(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k) * 0.4 + (1.0 - visible(q, k, start, count).to(torch.float32)) * LOWEST, v)


@spelling("added logarithm of the mask")
def added_log(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k) * 0.4 + visible(q, k, start, count).float().log(), v)


@spelling("1e9 taken off where hidden")
def taken_off(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k) * 0.4 - (~visible(q, k, start, count)) * 1e9, v)


@spelling("added mask, expanded over the heads")
def added_expanded(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    bias = torch.where(visible(q, k, start, count), 0.0, LOWEST)
    return mixed(products(q, k) * 0.4 + bias.expand(-1, 4, -1, -1), v)


@spelling("added sum of a causal mask and one for the window")
def added_parts(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None, :]
    causal = torch.where((key >= 0) & (key <= query), 0.0, -1e9)
    near = torch.where(query - key < WINDOW, 0.0, -1e9)
    return mixed(products(q, k) * 0.4 + (causal + near), v)


@spelling("mask without an axis for heads")
def mask_of_three_axes(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, :, None], held_positions(k, start, count)[:, None, :]
    seen = (key >= 0) & (key <= query) & (query - key < WINDOW)
    return mixed(torch.where(seen[:, None], products(q, k) * 0.4, -1e9), v)


@spelling("mask with an axis for groups and one for heads")
def mask_of_five_axes(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, H, T, D = q.shape
    query = positions(q, start)[:, None, None, :, None]
    key = held_positions(k, start, count)[:, None, None, None, :]
    seen = (key >= 0) & (key <= query) & (query - key < WINDOW)
    scores = q.view(B, 2, 2, T, D) @ k[:, :, None].mT * 0.4
    return (scores.masked_fill(~seen, -1e9).softmax(-1) @ v[:, :, None]).view(B, H, T, D)


# The condition of the mask.


@spelling("k > q - window, other order")
def condition_order(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start).unsqueeze(1).unsqueeze(-1), held_positions(k, start, count)[:, None, None]
    return mixed(torch.where((key > query - WINDOW) & (key <= query) & (key > -1), products(q, k) * 0.4, LOWEST), v)


@spelling("distance between 0 and the window")
def condition_distance(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    distance = query - key
    seen = torch.logical_and(torch.logical_and(distance >= 0, distance <= WINDOW - 1), key.ge(0))
    return mixed(torch.where(seen, products(q, k) * 0.4, LOWEST), v)


@spelling("not (empty or future or far)")
def condition_not_or(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    bad = (key < 0) | (key > query) | (query - key >= WINDOW)
    return mixed(torch.where(bad.logical_not(), products(q, k) * 0.4, LOWEST), v)


@spelling("window of three", window=3)
def window_of_three(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count, 3), products(q, k) * 0.4, LOWEST), v)


@spelling("no window", window=FULL)
def no_window(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count, None), products(q, k) * 0.4, LOWEST), v)


# The scale.


@spelling("divided by sqrt(d)", 6**-0.5)
def divided(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed((products(q, k) / math.sqrt(6)).masked_fill(~visible(q, k, start, count), LOWEST), v)


@spelling("scale on the query")
def scale_on_query(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count), products(q * 0.4, k), LOWEST), v)


@spelling("scale on the keys, after the repeat")
def scale_on_keys(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = q @ (0.4 * expand_heads(k)).transpose(2, 3)
    return mixed(torch.where(visible(q, k, start, count), scores, LOWEST), v)


@spelling("root of the scale on both", 6**-0.5)
def scale_on_both(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count), products(q / 6**0.25, k * 6**-0.25), LOWEST), v)


@spelling("scale after the mask was added")
def scale_after_mask(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed((products(q, k) + torch.where(visible(q, k, start, count), 0.0, LOWEST)) * 0.4, v)


@spelling("no scale", 1.0)
def no_scale(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count), products(q, k), LOWEST), v)
