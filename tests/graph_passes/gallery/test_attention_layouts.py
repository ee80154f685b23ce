"""Attention whose inputs lie in other layouts: the node gets them turned, and the proof feeds both forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from graph_passes.driver import apply
from graph_passes.fuse import gqa
from tests.graph_passes.gallery.attention import LOWEST, expand_heads
from tests.graph_passes.gallery.tracing import trace
from tests.support.graphs import op_types, run

Shape = tuple[str | int, ...]


def tokens_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[B, T, H, D] and [B, S, G, D], as flash attention takes them."""
    key, value = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, key) * 0.4
    weights = scores.masked_fill(mask < 0.5, LOWEST).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, value)


def keys_turned(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Keys held as [B, G, D, S], so that no product turns them."""
    key = k.repeat_interleave(2, 1)
    return (q @ key * 0.4).masked_fill(mask < 0.5, LOWEST).softmax(-1) @ expand_heads(v)


def groups_apart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A query of groups and of the heads of each, [B, T, G, R, D]."""
    query = q.permute(0, 2, 3, 1, 4)
    weights = (query @ k[:, :, None].mT * 0.4).masked_fill(mask[:, None] < 0.5, LOWEST).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


def mask_of_three_axes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A mask without an axis for the heads, compared before it gets one in two steps."""
    hidden = (mask < 0.5)[:, None].expand(-1, 4, -1, -1)
    return (q @ expand_heads(k).mT * 0.4).masked_fill(hidden, LOWEST).softmax(-1) @ expand_heads(v)


def mask_of_five_axes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A mask with two axes for heads."""
    query = torch.stack([q[:, :2], q[:, 2:]], 1)
    weights = (query @ k[:, :, None].mT * 0.4).masked_fill(mask < 0.5, LOWEST).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


HEADS_FIRST: dict[str, Shape] = {
    "query": ("B", 4, "T", 6),
    "key": ("B", 2, "S", 6),
    "value": ("B", 2, "S", 6),
    "mask": ("B", 1, "T", "S"),
}

LAYOUTS: list[tuple[Callable[..., Tensor], dict[str, Shape]]] = [
    (tokens_first, {"query": ("B", "T", 4, 6), "key": ("B", "S", 2, 6), "value": ("B", "S", 2, 6)}),
    (keys_turned, {"key": ("B", 2, 6, "S")}),
    (groups_apart, {"query": ("B", "T", 2, 2, 6)}),
    (mask_of_three_axes, {"mask": ("B", "T", "S")}),
    (mask_of_five_axes, {"mask": ("B", 1, 1, "T", "S")}),
]


@pytest.mark.parametrize(("program", "layout"), LAYOUTS, ids=lambda value: getattr(value, "__name__", ""))
def test_fuses(
    program: Callable[..., Tensor], layout: dict[str, Shape], record_property: Callable[[str, object], None]
) -> None:
    record_property("spelling", ("attention", "fused"))
    shapes = {**HEADS_FIRST, **layout}
    model = trace(program, shapes, ["attended"])
    fused, refused = apply(model, gqa.RULE)
    assert len(fused) == 1, [str(record) for record in refused]
    assert fused[0].attributes == {"scale": pytest.approx(0.4)}
    assert not {"Softmax", "MatMul", "Einsum", "Expand", "Where"} & set(op_types(model))
    rng = np.random.default_rng(0)
    sizes = {"B": 2, "T": 3, "S": 7}
    arrays = {}
    for name, shape in shapes.items():
        extents = [extent if isinstance(extent, int) else sizes[extent] for extent in shape]
        draw = rng.random(extents) if name == "mask" else rng.standard_normal(extents)
        arrays[name] = draw.astype(np.float32)
    arrays["mask"][..., 0] = 1  # every token sees a key
    want = program(*(torch.from_numpy(array) for array in arrays.values())).numpy()
    np.testing.assert_allclose(run(model, arrays)["attended"], want, rtol=1e-5, atol=1e-5)
