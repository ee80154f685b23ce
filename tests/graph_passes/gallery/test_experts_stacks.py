"""Experts whose matrices lie in unusual stacks: joined by the program, or square."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from graph_passes.driver import apply
from graph_passes.fuse import moe
from tests.graph_passes.gallery.experts import SINGLE, STACKS, C, E, feeds, gathered, routed, routed_graph
from tests.support.graphs import op_types, run


def stacked_single(x: Tensor, w: Tensor, e: Tensor, *single: Tensor) -> Tensor:
    """The same matrices, stacked before they are used."""
    gate, up, down = (torch.stack(single[n * E : n * E + E]) for n in range(3))
    return gathered(x, w, e, gate, up, down)


def test_matrices_that_the_program_stacks_are_read_as_it_stacks_them(
    record_property: Callable[[str, object], None],
) -> None:
    record_property("spelling", ("MoE experts", "fused"))
    model = routed_graph(stacked_single, SINGLE)
    assert len(apply(model, moe.RULE)[0]) == 1
    assert set(op_types(model)) == {"MoEGate", "Unsqueeze", "Concat", "MixtureOfExperts"}
    arrays = feeds(7, 7)
    want = routed(gathered)(*(torch.from_numpy(array) for array in arrays.values())).numpy()
    single = {f"{name}_{i}": arrays[name][i] for name in STACKS for i in range(E)}
    got = run(model, {"x": arrays["x"], "logits": arrays["logits"], **single})["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_experts_of_square_matrices_are_told_apart_by_trial(record_property: Callable[[str, object], None]) -> None:
    """With I = C the shapes say nothing of up and down, nor of their layout."""
    record_property("spelling", ("MoE experts", "fused"))
    square = {name: (E, C, C) for name in STACKS}
    model = routed_graph(lambda x, w, e, g, u, d: gathered(x, w, e, g, u.mT, d.mT), square)
    assert len(apply(model, moe.RULE)[0]) == 1
    arrays = feeds(7, 7)
    rng = np.random.default_rng(1)
    arrays |= {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in square.items()}
    x, logits, g, u, d = (torch.from_numpy(array) for array in arrays.values())
    want = routed(gathered)(x, logits, g, u.mT, d.mT).numpy()
    np.testing.assert_allclose(run(model, arrays)["y"], want, rtol=1e-4, atol=1e-3)
