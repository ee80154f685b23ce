"""MixtureOfExperts: the chosen gated units of each token, weighted and added (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.activations import activation_body
from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes, static

MOST_NUMBERS = 1 << 20
"""Stacks of up to so many numbers are proved at their own sizes, which constants in the region may hold.

A region with larger ones and constants of their size can be proved on a twin only (`graph_passes.twin`).
"""


def _body(attributes: Attributes) -> str:
    """Every expert on every token, times a weight that is mostly zero: static shapes, which any backend can run.

    Zero weights are chosen away and not only multiplied: an expert may overflow on a token that it was not trained for.
    """
    return f"""
    axis_0 = Constant <value_ints = [0]> ()
    axis_2 = Constant <value_ints = [2]> ()
    tokens = Shape <start = 0, end = 1> (x_NC)
    experts = Shape <start = 0, end = 1> (gate_EIC)
    tokens_experts = Concat <axis = 0> (tokens, experts)
    zero_raw = Constant <value_float = 0.0> ()
    zero = CastLike (zero_raw, x_NC)
    nothing_NE = Expand (zero, tokens_experts)
    weight_like_x = CastLike (weight_NK, x_NC)
    weight_NE = ScatterElements <axis = 1> (nothing_NE, expert_NK, weight_like_x)
    weight_EN = Transpose <perm = [1, 0]> (weight_NE)
    weight_EN1 = Unsqueeze (weight_EN, axis_2)
    gate_wide = CastLike (gate_EIC, x_NC)
    up_wide = CastLike (up_EIC, x_NC)
    down_wide = CastLike (down_ECI, x_NC)
    gate_ECI = Transpose <perm = [0, 2, 1]> (gate_wide)
    up_ECI = Transpose <perm = [0, 2, 1]> (up_wide)
    down_EIC = Transpose <perm = [0, 2, 1]> (down_wide)
    gate_ENI = MatMul (x_NC, gate_ECI)
    up_ENI = MatMul (x_NC, up_ECI)
    {activation_body(str(attributes["activation"]), "gate_ENI", "active_ENI")}
    gated_ENI = Mul (active_ENI, up_ENI)
    out_ENC = MatMul (gated_ENI, down_EIC)
    weighted_ENC = Mul (out_ENC, weight_EN1)
    unchosen_EN1 = Equal (weight_EN1, zero)
    chosen_ENC = Where (unchosen_EN1, zero, weighted_ENC)
    y_NC = ReduceSum <keepdims = 0> (chosen_ENC, axis_0)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Every expert in every one of the K places, random choices, tokens that all go the same way; tokens far from zero.

    One choice has a weight of zero, as a softmax gives it where another logit is larger by more than a hundred.
    Large matrices are taken smaller: their sizes do not enter the routing.
    """
    E = static(shapes[3], 0, 4)
    K = static(shapes[1], 1, 2)
    C, I = static(shapes[0], 1, 12), static(shapes[3], 1, 10)
    if E * I * C > MOST_NUMBERS:
        C, I = 12, 10
    in_turn = (np.arange(E)[:, None] + np.arange(K)) % E
    at_random = np.stack([rng.permutation(E)[:K] for _ in range(E + 1)])
    alike = np.tile(rng.permutation(E)[:K], (3, 1))
    for expert, size in ((at_random[:1], 1), (np.concatenate([in_turn, at_random]), 1), (alike, 16)):
        N = len(expert)
        x = np.float32(size) * rng.standard_normal((N, C), dtype=np.float32)
        weight = rng.random((N, K), dtype=np.float32) + np.float32(0.1)
        weight[N // 2, -1] = 0 if N > 1 else 1
        gate, up = rng.standard_normal((2, E, I, C), dtype=np.float32)
        down = rng.standard_normal((E, C, I), dtype=np.float32)
        yield x, weight, expert.astype(np.int64), gate, up, down


MIXTURE_OF_EXPERTS = PluginOp(
    name="MixtureOfExperts",
    inputs=("x_NC", "weight_NK", "expert_NK", "gate_EIC", "up_EIC", "down_ECI"),
    outputs=("y_NC",),
    attributes={"activation": "string"},
    body=_body,
    examples=_examples,
)
"""x [N, C] float32 or what an engine computes in, weight [N, K] float32; expert int64 [N, K] (distinct within a token);
gate and up [E, I, C], down [E, C, I], all float32, float16 or bfloat16; to y [N, C], as x.

y[n] = Σ_k weight[n, k] · down_e(act(gate_e(x[n])) · up_e(x[n])) with e = expert[n, k]. The weights need not sum to one.
"""
