"""What the spellings of a mixture's experts share: sizes, the router before them, feeds, and the plain sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig

from graph_passes.driver import apply
from graph_passes.fuse import moe_gate
from tests.graph_passes.gallery.tracing import trace

Program = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
E, K, C, I = 4, 2, 12, 10
STACKS = {"gate": (E, I, C), "up": (E, I, C), "down": (E, C, I)}
SINGLE = {f"{name}_{i}": shape[1:] for name, shape in STACKS.items() for i in range(E)}
"""Three matrices for each expert."""


def scattered(x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    """Weights of all experts, [N, E]."""
    return torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, e, w)


def units(x: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    """What every expert makes of every token, [E, N, C]."""
    return (F.silu(x @ g.mT) * (x @ u.mT)) @ d.mT


def gathered(
    x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor, act: Callable[[Tensor], Tensor] = F.silu
) -> Tensor:
    """Only the chosen experts, by einsum: what the others are held against."""
    h = act(torch.einsum("nc,nkic->nki", x, g[e])) * torch.einsum("nc,nkic->nki", x, u[e])
    return torch.einsum("nki,nkci,nk->nc", h, d[e], w)


def mixtral(activation: str = "silu") -> MixtralConfig:
    config = MixtralConfig(
        num_local_experts=E, num_experts_per_tok=K, hidden_size=C, intermediate_size=I, hidden_act=activation
    )
    config._experts_implementation = "batched_mm"
    return config


def routed(program: Program) -> Callable[..., Tensor]:
    """The program behind a router's logits [N, E]."""

    def whole(x: Tensor, logits: Tensor, *stacks: Tensor) -> Tensor:
        best, expert = torch.topk(torch.softmax(logits, -1), K)
        return program(x, best / best.sum(-1, keepdim=True), expert, *stacks)

    return whole


def routed_graph(program: Callable[..., Tensor], extra: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """The canonical graph with its gate fused, given other stacks than the usual ones."""
    model = trace(routed(program), {"x": ("N", C), "logits": ("N", E), **extra}, ["y"])
    assert len(apply(model, moe_gate.RULE)[0]) == 1
    return model


def feeds(tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Random tokens; the logits of the first four rows choose each expert first."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, E), dtype=np.float32)
    for row in range(min(tokens, E)):
        logits[row, row] += 6
    arrays = {"x": rng.standard_normal((tokens, C), dtype=np.float32), "logits": logits}
    return arrays | {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in STACKS.items()}
