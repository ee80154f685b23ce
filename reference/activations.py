"""Activations by the names that Hugging Face configs use (`hidden_act`).

Each is written with elementary functions of `torch` so that it traces to standard ONNX operators. The same names are
accepted by `reference.config`; a test holds the two sets equal and each function against its namesake in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def silu(x: Tensor) -> Tensor:
    """x·sigmoid(x), of any shape (Elfwing et al. 2017, arXiv:1702.03118)."""
    return x * torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x) with the exact normal distribution function (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of `gelu` from the same paper."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of `gelu` from the same paper."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, arXiv:2109.08668)."""
    positive = torch.relu(x)
    return positive * positive


ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": torch.relu,
    "relu2": relu_squared,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
