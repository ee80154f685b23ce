"""MixtureOfExperts: the chosen gated units of each token, weighted and added (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes, static

ACTIVATIONS = {
    "silu": """
    gate_sigmoid = Sigmoid (gate_ENI)
    active_ENI = Mul (gate_ENI, gate_sigmoid)
    """,
    "gelu": """
    active_ENI = Gelu <approximate = "none"> (gate_ENI)
    """,
    "gelu_tanh": """
    active_ENI = Gelu <approximate = "tanh"> (gate_ENI)
    """,
    "quick_gelu": """
    slope_raw = Constant <value_float = 1.702> ()
    slope = CastLike (slope_raw, gate_ENI)
    gate_steep = Mul (gate_ENI, slope)
    gate_sigmoid = Sigmoid (gate_steep)
    active_ENI = Mul (gate_ENI, gate_sigmoid)
    """,
    "relu": """
    active_ENI = Relu (gate_ENI)
    """,
    "relu2": """
    gate_positive = Relu (gate_ENI)
    active_ENI = Mul (gate_positive, gate_positive)
    """,
    "sigmoid": """
    active_ENI = Sigmoid (gate_ENI)
    """,
    "tanh": """
    active_ENI = Tanh (gate_ENI)
    """,
}
"""Statements that make `active_ENI` from `gate_ENI`, by the value of the node's `activation`."""


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
    weight_NE = ScatterElements <axis = 1> (nothing_NE, expert_NK, weight_NK)
    weight_EN = Transpose <perm = [1, 0]> (weight_NE)
    weight_EN1 = Unsqueeze (weight_EN, axis_2)
    gate_ECI = Transpose <perm = [0, 2, 1]> (gate_EIC)
    up_ECI = Transpose <perm = [0, 2, 1]> (up_EIC)
    down_EIC = Transpose <perm = [0, 2, 1]> (down_ECI)
    gate_ENI = MatMul (x_NC, gate_ECI)
    up_ENI = MatMul (x_NC, up_ECI)
    {ACTIVATIONS[str(attributes["activation"])].strip()}
    gated_ENI = Mul (active_ENI, up_ENI)
    out_ENC = MatMul (gated_ENI, down_EIC)
    weighted_ENC = Mul (out_ENC, weight_EN1)
    unchosen_EN1 = Equal (weight_EN1, zero)
    chosen_ENC = Where (unchosen_EN1, zero, weighted_ENC)
    y_NC = ReduceSum <keepdims = 0> (chosen_ENC, axis_0)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Small experts (their sizes do not enter the routing) under every choice of K among E, each expert used."""
    E = static(shapes[3], 0, 4)
    K = static(shapes[1], 1, 2)
    C, I = 12, 10
    for N in (1, 2 * E + 1):
        x = rng.standard_normal((N, C), dtype=np.float32)
        expert = np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype(np.int64)
        expert[:, 0] = np.arange(N) % E
        for k in range(1, K):  # keep the K choices of a token distinct
            while (clash := (expert[:, k : k + 1] == expert[:, :k]).any(axis=1)).any():
                expert[clash, k] = (expert[clash, k] + 1) % E
        weight = rng.random((N, K), dtype=np.float32) + np.float32(0.1)
        gate, up = rng.standard_normal((2, E, I, C), dtype=np.float32)
        down = rng.standard_normal((E, C, I), dtype=np.float32)
        yield x, weight, expert, gate, up, down


MIXTURE_OF_EXPERTS = PluginOp(
    name="MixtureOfExperts",
    inputs=("x_NC", "weight_NK", "expert_NK", "gate_EIC", "up_EIC", "down_ECI"),
    outputs=("y_NC",),
    attributes={"activation": "string"},
    body=_body,
    examples=_examples,
)
"""x [N, C], weight [N, K], expert int64 [N, K] (distinct within a token), gate and up [E, I, C], down [E, C, I].

y[n] = Σ_k weight[n, k] · down_e(act(gate_e(x[n])) · up_e(x[n])) with e = expert[n, k]. The weights need not sum to one.
"""
