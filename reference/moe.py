"""Feed-forward layers: the gated unit, and the mixture of such units.

Shapes: N tokens, C hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reference.activations import ACTIVATIONS
from reference.config import ModelConfig, MoEConfig
from reference.norm import at_least_float32


def _as_it_is(x: Tensor) -> Tensor:
    return x


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202; SwiGLU when the activation is SiLU)."""

    def __init__(self, config: ModelConfig, *, device: str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        hidden, intermediate, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_NC: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x_NC)) * self.up_proj(x_NC))
        return out


class MixtureOfExperts(nn.Module):
    """A router picks K of E gated units for each token (Jiang et al. 2024, arXiv:2401.04088).

    Expert weights lie batched: `gate_proj` and `up_proj` [E, I, C], `down_proj` [E, C, I]. Ties between router
    probabilities go to the lower expert.
    """

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, *, device: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        E, I, C = moe.num_experts, config.intermediate_size, config.hidden_size
        self.top_k = moe.top_k
        self.router = nn.Linear(C, E, bias=False, device=device, dtype=dtype)
        self.gate_proj = nn.Parameter(torch.empty(E, I, C, device=device, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(E, I, C, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(E, C, I, device=device, dtype=dtype))
        self.activation = ACTIVATIONS[config.activation]
        self.round_input: Callable[[Tensor], Tensor] = _as_it_is  # see reference.rounding
        self.round_gated: Callable[[Tensor], Tensor] = _as_it_is

    def route(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, K] that sum to one, and expert numbers [N, K], best first."""
        probability_NE = torch.softmax(at_least_float32(self.router(x_NC)), dim=-1)
        # Not topk: which of two equal values that takes is left open, and on the CPU it is often the later one.
        weight_NE, expert_NE = torch.sort(probability_NE, dim=-1, descending=True, stable=True)
        return self._renormalised(weight_NE[:, : self.top_k], x_NC), expert_NE[:, : self.top_k]

    def route_dense(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """`route` as it is traced: ONNX's TopK, which torch.topk becomes, gives equal values to the lower index."""
        probability_NE = torch.softmax(at_least_float32(self.router(x_NC)), dim=-1)
        weight_NK, expert_NK = torch.topk(probability_NE, self.top_k, dim=-1)
        return self._renormalised(weight_NK, x_NC), expert_NK

    @staticmethod
    def _renormalised(weight_NK: Tensor, x_NC: Tensor) -> Tensor:
        return (weight_NK / weight_NK.sum(-1, keepdim=True)).to(x_NC.dtype)

    def forward(self, x_NC: Tensor) -> Tensor:
        """Each expert works on the tokens that chose it, and on no others."""
        weight_NK, expert_NK = self.route(x_NC)
        out_NC = torch.zeros_like(x_NC)
        for expert in range(self.router.out_features):
            token, choice = torch.where(expert_NK == expert)
            if token.numel() == 0:
                continue
            x = self.round_input(x_NC[token])
            gated = self.activation(x @ self.gate_proj[expert].T) * (x @ self.up_proj[expert].T)
            gated = self.round_gated(gated)
            out_NC.index_add_(0, token, (gated @ self.down_proj[expert].T) * weight_NK[token, choice, None])
        return out_NC

    def forward_dense(self, x_NC: Tensor) -> Tensor:
        """The same sum with static shapes: every expert on every token, times a weight that is mostly zero.

        This is the spelling that is traced: it has one form for any E, and the fused node decides how to run it.
        """
        weight_NK, expert_NK = self.route_dense(x_NC)
        weight_NE = torch.zeros(x_NC.shape[0], self.router.out_features, dtype=x_NC.dtype, device=x_NC.device)
        weight_NE = weight_NE.scatter(1, expert_NK, weight_NK)
        gate_ENI = torch.matmul(x_NC, self.gate_proj.transpose(1, 2))
        up_ENI = torch.matmul(x_NC, self.up_proj.transpose(1, 2))
        expert_ENC = torch.matmul(self.activation(gate_ENI) * up_ENI, self.down_proj.transpose(1, 2))
        return (expert_ENC * weight_NE.transpose(0, 1)[:, :, None]).sum(0)
