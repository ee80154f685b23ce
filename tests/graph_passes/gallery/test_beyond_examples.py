"""Programs that are an op on short inputs, in one row, or at common values, and are not beyond: none may be fused.

Proofs run on examples. What they cannot reach has to be told from the graph, or asked for on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graph_passes.driver import apply
from graph_passes.fuse import gated_activation, gqa, rope, sliding_window
from tests.graph_passes.gallery.attention import (
    LOWEST,
    WINDOW,
    Program,
    held_positions,
    mixed,
    positions,
    products,
    trace_each,
    visible,
)
from tests.graph_passes.gallery.tracing import trace

LONGEST = 2**20
PENALTY_S = -0.1 * torch.clamp(torch.arange(LONGEST) - 16, min=0)
GROWTH_T = torch.where(torch.arange(LONGEST) < 100, 1.0, 2.0)


def far_keys_penalised(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """A bias cut from a table that is zero for the first 16 slots."""
    mask = torch.where(visible(q, k, start, count), 0.0, -1e9)
    return mixed(products(q, k) * 0.4 + (mask + PENALTY_S[: k.shape[2]]), v)


def masks_that_differ(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """A bias that is zero wherever the second mask is the same on all slots."""
    bias = torch.where(visible(q, k, start, count, 3), 5.0, 0.0)
    mask = torch.where(visible(q, k, start, count), 0.0, -1e9) + (bias - bias.flip(2))
    return mixed(products(q, k) * 0.4 + mask, v)


def softmax_in_half_precision(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """ONNX Runtime has no such kernel for the CPU, and computes it in float32."""
    masked = torch.where(visible(q, k, start, count), products(q, k) * 0.4, LOWEST)
    return mixed(masked.half().float(), v)


def one_start_for_all_rows(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    shared = start.amax(0, keepdim=True).expand(start.shape[0])
    return mixed(torch.where(visible(q, k, shared, count), products(q, k) * 0.4, LOWEST), v)


def window_within_blocks(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Blocks of 1,009 tokens that do not see each other."""
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    near = (key >= 0) & (key <= query) & (query - key < WINDOW)
    return mixed(torch.where(near & (key // 1009 == query // 1009), products(q, k) * 0.4, LOWEST), v)


def keys_beyond_a_gap(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """A second window, of 700 tokens, for which the ring has room only when it is much longer than the first."""
    query, key = positions(q, start)[:, None, :, None], held_positions(k, start, count)[:, None, None]
    near = (query - key < WINDOW) | ((query - key >= 700) & (query < 100_000) & (query % 2 == 0))
    return mixed(torch.where((key >= 0) & (key <= query) & near, products(q, k) * 0.4, LOWEST), v)


ATTENTION: dict[str, tuple[Program, str]] = {
    "a bias from a table, zero at first": (far_keys_penalised, r"computed from .* \(by Slice\): a bias"),
    "two masks, a bias where they differ": (masks_that_differ, "masked scores are 5, which leaves them some weight"),
    "softmax in half precision": (softmax_in_half_precision, "rounded to a narrower type"),
}
MASKS: dict[str, tuple[Program, str]] = {
    "one start for all rows": (one_start_for_all_rows, "no causal window"),
    "a window within blocks": (window_within_blocks, "does not see slot"),
    "keys beyond a gap": (keys_beyond_a_gap, "no causal window"),
}


@pytest.fixture(scope="module")
def traced() -> dict[str, ir.Model]:
    """The canonical graph of every program."""
    return trace_each({name: program for name, (program, _) in {**ATTENTION, **MASKS}.items()})


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, traced: dict[str, ir.Model]) -> None:
    fused, (record,) = apply(traced[name], gqa.RULE)
    assert fused == []
    assert re.search(ATTENTION[name][1], record.reason), record.reason


@pytest.mark.parametrize("name", MASKS)
def test_window(name: str, traced: dict[str, ir.Model]) -> None:
    assert len(apply(traced[name], gqa.RULE)[0]) == 1
    fused, (record,) = apply(traced[name], sliding_window.RULE)
    assert fused == []
    assert re.search(MASKS[name][1], record.reason), record.reason


def test_rotation_by_a_table_that_is_one_at_first() -> None:
    def program(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        growth = GROWTH_T[: x.shape[2]][None, None, :, None]
        c, s = cos[:, None], sin[:, None]
        return torch.cat([low * c * growth - high * s * growth, high * c * growth + low * s * growth], -1)

    model = trace(program, {"x": ("B", 4, "T", 6), "cos": ("B", "T", 3), "sin": ("B", "T", 3)}, ["y"])
    fused, refused = apply(model, rope.RULE)
    assert fused == []
    assert "where [B, T, 3] is needed" in refused[-1].reason


def cut_off(gate: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=500.0))


def grown(gate: Tensor) -> Tensor:
    return F.silu(gate) * GROWTH_T[: gate.shape[1]][None, :, None]


def first_tokens_only(gate: Tensor) -> Tensor:
    return torch.where(torch.arange(gate.shape[1])[None, :, None] < 100, F.silu(gate), gate)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (cut_off, "the activation is none that is known"),
        (grown, "the activation is not elementwise: .* comes from Slice"),
        (first_tokens_only, "the activation is not elementwise: .* comes from Range"),
    ],
)
def test_activation(activation: Callable[[Tensor], Tensor], reason: str) -> None:
    gate_weight, up_weight = torch.randn(2, 8, 6)

    def program(x: Tensor) -> Tensor:
        gated: Tensor = activation(x @ gate_weight) * (x @ up_weight)
        return gated

    model = trace(program, {"x": ("B", "T", 8)}, ["y"])
    fused, refused = apply(model, gated_activation.RULE)
    assert fused == []
    assert any(re.search(reason, record.reason) for record in refused), refused
