"""MoEGate: which experts a token goes to, and with what weights (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes, static


def _body(attributes: Attributes) -> str:
    return """
    axis_1 = Constant <value_ints = [1]> ()
    top_k = Constant <value_int: int = @top_k> ()
    top_k_1 = Reshape (top_k, axis_1)
    probability_NE = Softmax <axis = -1> (logits_NE)
    best_NK, expert_NK = TopK <axis = -1> (probability_NE, top_k_1)
    total_N1 = ReduceSum (best_NK, axis_1)
    weight_NK = Div (best_NK, total_N1)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Spread logits, nearly equal ones, exact ties (the lower expert wins), one expert far ahead, each once the best,
    all zero, and far below or above zero. In one row all weights but the first are zero.

    Each once the best, so that an expert which the graph treats in a way of its own is seen, however many there are.
    Zero, since masks mark with it what was not chosen. Far off, since softmax does not see it and a small number
    added to a sum of exponentials, or a maximum over all tokens, does.
    """
    N, E = static(shapes[0], 0, 5), static(shapes[0], 1, 8)
    spread = 3 * rng.standard_normal((N, E), dtype=np.float32)
    close = 1 + 1e-3 * rng.standard_normal((N, E), dtype=np.float32)
    tied = rng.integers(0, 2, (N, E)).astype(np.float32)
    lone = np.where(np.arange(E) == rng.integers(0, E, (N, 1)), np.float32(30), np.float32(0))
    each = np.eye(static(shapes[0], 0, E), E, dtype=np.float32) + rng.standard_normal(E, dtype=np.float32) / 8
    far = spread + np.where(np.arange(N)[:, None] % 2 == 0, np.float32(-60), np.float32(60))
    # Falling, so that the lowest expert numbers are the best whether weights of zero are tied or logits compared.
    spread[0] = np.float32(-200) * np.arange(E, dtype=np.float32)
    for logits in (spread, close, tied, lone.astype(np.float32), each, np.zeros((N, E), np.float32), far):
        yield (logits,)


MOE_GATE = PluginOp(
    name="MoEGate",
    inputs=("logits_NE",),
    outputs=("weight_NK", "expert_NK"),
    attributes={"top_k": "int"},
    body=_body,
    examples=_examples,
)
"""Router logits [N, E] to weights [N, K] that sum to one, and expert numbers int64 [N, K], best first.

Softmax over all experts, the K best, renormalised, which equals softmax over the K best logits. Ties go to the lower
expert number.
"""
