"""Spellings of attention: all that compute grouped-query attention over a causal window become one node.

Each program takes query [B, 4, T, 6], rings of keys and values [B, 2, S, 6], start and count [B], and makes its own
mask, as the traced step does. What is not that attention is refused, in words; see `test_attention_refusals`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from graph_passes.driver import apply
from graph_passes.fuse import gqa, sliding_window
from graph_passes.ops.sliding_window_attention import FULL
from tests.graph_passes.gallery import attention_masks, attention_products
from tests.graph_passes.gallery.attention import (
    LOWEST,
    SPELLINGS,
    WINDOW,
    Program,
    expand_heads,
    mixed,
    products,
    trace_each,
    visible,
)
from tests.graph_passes.gallery.tracing import trace
from tests.support.graphs import op_types, run

assert {attention_masks.__name__, attention_products.__name__} == {p.__module__ for p, _, _ in SPELLINGS.values()}


def turned_values(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Values in the opposite order of slots."""
    weights = (products(q, k) * 0.4).masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1)
    return weights @ expand_heads(v).flip(2)


def crossed_heads(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Values of the other head than the keys."""
    weights = (products(q, k) * 0.4).masked_fill(~visible(q, k, start, count), LOWEST).softmax(-1)
    return weights @ v[:, [1, 1, 0, 0]]


def scaled_values(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Twice the values."""
    return mixed(torch.where(visible(q, k, start, count), products(q, k) * 0.4, LOWEST), v * 2)


OUTSIDE: dict[str, Program] = {f.__name__: f for f in (turned_values, crossed_heads, scaled_values)}
"""Programs that do more than attention; the rest stays in front of the node."""


def feeds(window: int) -> list[dict[str, np.ndarray]]:
    """Rows at every border, in chunks of three and single tokens; the last row is padded."""
    made = []
    rng = np.random.default_rng(0)
    for tokens in (3, 1):
        slots = max(window, 4) + 2
        borders = {0, 1, window - 1, window, window + 1, 2 * window + 1, slots, 3 * slots + 2}
        starts = [0, 1, slots - tokens] if window == FULL else [*sorted(borders), window]
        rows = len(starts)
        key, value = rng.standard_normal((2, rows, 2, slots, 6), dtype=np.float32)
        count = np.full(rows, tokens, np.int64)
        if window != FULL:
            count[-1] = max(1, tokens - 1)
        made.append(
            {
                "query": 2 * rng.standard_normal((rows, 4, tokens, 6), dtype=np.float32),
                "key": key,
                "value": value,
                "start": np.array(starts, np.int64),
                "count": count,
            }
        )
    return made


@pytest.fixture(scope="module")
def traced() -> dict[str, ir.Model]:
    """The canonical graph of every spelling."""
    return trace_each({**{name: program for name, (program, _, _) in SPELLINGS.items()}, **OUTSIDE})


@pytest.mark.parametrize("name", SPELLINGS)
def test_fuses(name: str, traced: dict[str, ir.Model], record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("attention", "fused"))
    program, scale, window = SPELLINGS[name]
    model = traced[name]
    for rule in (gqa.RULE, sliding_window.RULE):
        fused, refused = apply(model, rule)
        assert len(fused) == 1, [str(record) for record in refused]
        assert refused == []
    assert fused[0].attributes == {"scale": pytest.approx(scale, rel=1e-6), "window": window}
    assert set(op_types(model)) <= {"SlidingWindowAttention", "Transpose", "Reshape", "Slice"}
    assert_same(program, model, window)


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_no_part_of_attention_stays_outside(
    name: str, traced: dict[str, ir.Model], record_property: Callable[[str, object], None]
) -> None:
    record_property("spelling", ("attention", "fused"))
    model = traced[name]
    for rule in (gqa.RULE, sliding_window.RULE):
        assert len(apply(model, rule)[0]) == 1
    assert op_types(model).count("SlidingWindowAttention") == 1
    assert not {"Softmax", "MatMul"} & set(op_types(model))
    assert_same(OUTSIDE[name], model, WINDOW)


def assert_same(program: Program, model: ir.Model, window: int) -> None:
    """The fused graph against the eager program, wherever a token is no padding."""
    for arrays in feeds(window):
        got = run(model, arrays)["attended"]
        want = program(*(torch.from_numpy(array) for array in arrays.values())).numpy()
        tokens_axis = 2 if want.shape[2] == arrays["query"].shape[2] else 1
        valid = np.arange(want.shape[tokens_axis]) < arrays["count"][:, None]
        got, want = (np.moveaxis(array, tokens_axis, 1)[valid] for array in (got, want))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


class Projected(nn.Module):
    """The attention of transformers from hidden states [B, T, C], heads made and joined as there."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(10, 24), nn.Linear(10, 12), nn.Linear(10, 12)
        self.o_proj = nn.Linear(24, 10)

    def forward(self, x: Tensor, start: Tensor, count: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, 6)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        attended = attention_products.transformers_eager(q, k, v, start, count)
        joined: Tensor = self.o_proj(attended.reshape(*x.shape[:-1], -1).contiguous())
        return joined


def test_finds_the_heads_behind_projections(record_property: Callable[[str, object], None]) -> None:
    """Query and keys have T tokens both here: which factor is which follows from the values alone."""
    record_property("spelling", ("attention", "fused"))
    torch.manual_seed(0)
    module = Projected()
    model = trace(module, {"x": ("B", "T", 10), "start": ("B",), "count": ("B",)}, ["y"], ("start", "count"))
    fused, refused = apply(model, gqa.RULE)
    assert len(fused) == 1, [str(record) for record in refused]
    floats = [node.op_type for node in model.graph if node.outputs[0].dtype == ir.DataType.FLOAT]
    assert not {"Softmax", "Expand", "Where"} & set(floats)
    assert floats.count("GroupedQueryAttention") == 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 10), dtype=np.float32)
    start, count = np.array([0, 4], np.int64), np.array([4, 4], np.int64)
    want = module(*(torch.from_numpy(array) for array in (x, start, count))).detach().numpy()
    np.testing.assert_allclose(run(model, {"x": x, "start": start, "count": count})["y"], want, rtol=1e-5, atol=1e-5)
