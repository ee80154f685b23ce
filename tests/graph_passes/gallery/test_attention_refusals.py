"""What looks like grouped-query attention over a causal window and is not: refused, in words a person understands."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_passes.driver import apply
from graph_passes.fuse import gqa, sliding_window
from tests.graph_passes.gallery.attention import (
    INPUTS,
    LOWEST,
    WINDOW,
    Program,
    expand_heads,
    held_positions,
    positions,
    trace_each,
    visible,
)
from tests.graph_passes.gallery.tracing import trace
from tests.support.graphs import serialised

NO_ATTENTION: dict[str, tuple[Program, str]] = {}
"""Name to program and the reason, as a regular expression, for which the attention is not recognised."""

NO_WINDOW: dict[str, tuple[Program, str]] = {}
"""The same for attention that is recognised, with a mask that is no causal window over a ring."""


def refused(
    name: str, reason: str, gallery: dict[str, tuple[Program, str]] = NO_ATTENTION
) -> Callable[[Program], Program]:
    """Adds a program to a gallery under `name`."""

    def add(program: Program) -> Program:
        assert name not in gallery
        gallery[name] = (program, reason)
        return program

    return add


def products(q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores [B, H, T, S]."""
    return q @ expand_heads(k).transpose(2, 3) * 0.4


def mixed(masked: Tensor, v: Tensor) -> Tensor:
    """Softmax and the product with the values."""
    return torch.softmax(masked, -1) @ expand_heads(v)


@refused("soft-capping", r"pass through Tanh \(soft-capping\)")
def soft_capping(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count), torch.tanh(products(q, k) / 30) * 30, LOWEST), v)


@refused("attention sink", "joined with a column that is no key")
def sink(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    masked = torch.where(visible(q, k, start, count), products(q, k), LOWEST)
    with_sink = torch.cat([masked, torch.ones_like(masked[..., :1])], -1)
    return torch.softmax(with_sink, -1)[..., :-1] @ expand_heads(v)


@refused("clipped scores", "the scores are clipped")
def clipped(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count), products(q, k).clamp(-5, 5), LOWEST), v)


@refused("ALiBi", "computed from integers .*: a bias, such as relative positions or ALiBi")
def alibi(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    distance = positions(q, start)[:, None, :, None] - held_positions(k, start, count)[:, None, None]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    return mixed(torch.where(visible(q, k, start, count), products(q, k) - slopes * distance, LOWEST), v)


@refused("relative-position table", "computed from integers .*: a bias, such as relative positions or ALiBi")
def table(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    distance = positions(q, start)[:, None, :, None] - held_positions(k, start, count)[:, None, None]
    bias = F.embedding(distance.clamp(0, 7), torch.linspace(0, 1, 8)[:, None])[..., 0]
    return mixed(torch.where(visible(q, k, start, count), products(q, k) + bias, LOWEST), v)


@refused("bias that depends on the query", "two products are added")
def query_bias(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    masked = torch.where(visible(q, k, start, count), products(q, k) + q.flip(3) @ expand_heads(k).mT, LOWEST)
    return mixed(masked, v)


@refused("masked with -10000", "masked scores are -10000, which leaves them some weight")
def shallow_fill(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k).masked_fill(~visible(q, k, start, count), -10000.0), v)


@refused("added -10000", "masked scores are -10000, which leaves them some weight")
def shallow_sum(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k) + (1.0 - visible(q, k, start, count).float()) * -10000.0, v)


@refused("masked before a small scale", "masked scores are -1e.09 times 0.0001")
def shallow_scale(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k).masked_fill(~visible(q, k, start, count), -1e9) * 1e-4, v)


@refused("hidden scores kept as they are", "neither choice of the mask is a constant")
def halved(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = products(q, k)
    return mixed(torch.where(visible(q, k, start, count), scores, scores - 1e9), v)


@refused("a mask that raises", "masked scores are 1e.09, which leaves")
def raised(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k) + (~visible(q, k, start, count)) * 1e9, v)


@refused("multiplied by the mask", "multiplied by more than one number")
def multiplied(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k) * visible(q, k, start, count).float(), v)


@refused("masked twice", "masked twice")
def twice(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    causal = products(q, k).masked_fill((key < 0) | (key > query), LOWEST)
    return mixed(causal.masked_fill(query - key >= WINDOW, LOWEST), v)


@refused("not masked", "the scores are not masked")
def unmasked(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(products(q, k), v)


@refused("a scale for each head", "multiplied by more than one number")
def scale_per_head(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = q @ expand_heads(k).mT * torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
    return mixed(torch.where(visible(q, k, start, count), scores, LOWEST), v)


@refused("scores rounded to half precision", "rounded to a narrower type")
def rounded(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return mixed(torch.where(visible(q, k, start, count), products(q, k).half().float(), LOWEST), v)


@refused("weights scaled as by dropout", "Mul changes the weights after the softmax, as dropout would|Div changes")
def scaled_weights(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    weights = torch.softmax(torch.where(visible(q, k, start, count), products(q, k), LOWEST), -1)
    return (weights / 0.9) @ expand_heads(v)


@refused("weights returned too", "have 2 readers")
def weights_read(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    weights = torch.softmax(torch.where(visible(q, k, start, count), products(q, k), LOWEST), -1)
    return weights @ expand_heads(v) + weights.sum(-1, keepdim=True).sqrt()


@refused("softmax over the tokens", "not a softmax over the last axis of scores")
def other_axis(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return torch.softmax(products(q, k).masked_fill(~visible(q, k, start, count), LOWEST), 2) @ expand_heads(v)


@refused("exp over another sum", "is not divided by its own sum at once")
def normalised_late(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    masked = torch.where(visible(q, k, start, count), products(q, k), LOWEST)
    power = torch.exp(masked - masked.amax(-1, keepdim=True))
    return power @ expand_heads(v) / power.sum(-1, keepdim=True)


@refused("maximum over another axis", "do not run over the last axis")
def other_maximum(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    masked = torch.where(visible(q, k, start, count), products(q, k), -1e30)
    power = torch.exp(masked - masked.amax(-2, keepdim=True))
    return power / power.sum(-1, keepdim=True) @ expand_heads(v)


@refused("logsumexp", "should come from ReduceMax, but comes from")
def logsumexp(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    masked = torch.where(visible(q, k, start, count), products(q, k), LOWEST)
    return torch.exp(masked - masked.logsumexp(-1, keepdim=True)) @ expand_heads(v)


@refused("heads tiled by repeat", r"tiled \(0 1 0 1\): grouped-query attention shares a head among neighbours")
def tiled(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    scores = q @ k.repeat(1, 2, 1, 1).mT * 0.4
    return scores.masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1) @ v.repeat(1, 2, 1, 1)


@refused("heads tiled by expand", r"tiled \(0 1 0 1\)")
def tiled_by_expand(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, G, S, D = k.shape
    key, value = (x[:, None].expand(B, 2, G, S, D).reshape(B, 4, S, D) for x in (k, v))
    return (q @ key.mT * 0.4).masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1) @ value


@refused("only the values' heads tiled", r"heads of 'value' are tiled \(0 1 0 1\)")
def tiled_values(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    weights = products(q, k).masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1)
    return weights @ torch.cat([v, v], 1)


@refused("heads grouped the other way round", "computes something else")
def grouped_outside_in(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    B, H, T, D = q.shape
    scores = torch.einsum("brgtd,bgsd->brgts", q.view(B, 2, 2, T, D), k) * 0.4
    weights = scores.masked_fill(~visible(q, k, start, count)[:, None], LOWEST).softmax(-1)
    return torch.einsum("brgts,bgsd->brgtd", weights, v).reshape(B, H, T, D)


@refused("sdpa without a mask", "the scores are not masked")
def sdpa_unmasked(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@refused("sdpa with is_causal", "causal by the order of its keys")
def sdpa_causal(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, expand_heads(k), expand_heads(v), is_causal=True)


@refused("sdpa with a shallow mask", "masked scores are -65504")
def sdpa_shallow(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    bias = torch.where(visible(q, k, start, count), 0.0, -65504.0)
    return F.scaled_dot_product_attention(q, expand_heads(k), expand_heads(v), attn_mask=bias)


@refused("window to both sides", "no causal window over a ring .* sees slot", NO_WINDOW)
def both_sides(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    seen = (key >= 0) & ((query - key).abs() < WINDOW)
    return mixed(torch.where(seen, products(q, k), LOWEST), v)


@refused("prefix that everyone sees", "no causal window over a ring .* sees slot", NO_WINDOW)
def prefix(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    seen = (key >= 0) & ((key <= query) & (query - key < WINDOW) | (key < 3))
    return mixed(torch.where(seen, products(q, k), LOWEST), v)


@refused("empty slots seen", "no causal window over a ring .* sees slot", NO_WINDOW)
def empty_slots(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    return mixed(torch.where((key <= query) & (query - key < WINDOW), products(q, k), LOWEST), v)


@refused("every second token", "no causal window over a ring .* sees slot|does not see slot", NO_WINDOW)
def dilated(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    seen = visible(q, k, start, count, 2 * WINDOW) & ((query - key) % 2 == 0)
    return mixed(torch.where(seen, products(q, k), LOWEST), v)


@pytest.fixture(scope="module")
def traced() -> dict[str, ir.Model]:
    """The canonical graph of every program."""
    return trace_each({name: program for name, (program, _) in {**NO_ATTENTION, **NO_WINDOW}.items()})


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_is_no_grouped_query_attention(
    name: str, traced: dict[str, ir.Model], record_property: Callable[[str, object], None]
) -> None:
    record_property("spelling", ("attention", "refused"))
    model = traced[name]
    before = serialised(model)
    fused, records = apply(model, gqa.RULE)
    assert fused == []
    assert len(records) == 1
    assert re.search(NO_ATTENTION[name][1], records[0].reason), records[0].reason
    assert serialised(model) == before


@pytest.mark.parametrize("name", NO_WINDOW)
def test_is_no_sliding_window(
    name: str, traced: dict[str, ir.Model], record_property: Callable[[str, object], None]
) -> None:
    record_property("spelling", ("attention", "refused"))
    model = traced[name]
    assert len(apply(model, gqa.RULE)[0]) == 1
    fused, records = apply(model, sliding_window.RULE)
    assert fused == []
    assert re.search(NO_WINDOW[name][1], records[0].reason), records[0].reason


class Capped(nn.Module):
    """A program whose lines the tracer notes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
        scores = q @ expand_heads(k).mT / math.sqrt(6)
        capped = torch.tanh(scores)
        return mixed(torch.where(visible(q, k, start, count), capped, LOWEST), v)


def test_names_the_node_where_it_broke_and_the_line_that_made_it() -> None:
    model = trace(Capped(), INPUTS, ["attended"], ("start", "count"))
    _, (record,) = apply(model, gqa.RULE)
    assert record.distance == 2
    assert record.source == "capped = torch.tanh(scores)"
    assert "2 nodes on, the scores pass through Tanh" in str(record)
    assert "(written as: capped = torch.tanh(scores))" in str(record)
