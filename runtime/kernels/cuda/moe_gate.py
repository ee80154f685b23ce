"""MoEGate on a GPU: the definition is `graph_passes.ops.moe_gate`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import Kernel, Launcher

MOST_EXPERTS = 256
MOST_CHOSEN = 16
_TOKENS_OF_BLOCK = 4


@dataclass(frozen=True, slots=True)
class GateProblem:
    """The best `top_k` of `experts` router logits of each of `tokens` tokens.

    Raises BackendError for what the kernel does not compute: more than 256 experts, more than 16 chosen of them.
    """

    tokens: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        refuse_sizes(self.experts, self.top_k)
        if self.tokens < 0:
            raise BackendError(f"There cannot be {self.tokens} tokens.")


@dataclass(frozen=True, slots=True)
class GateTensors:
    """Device addresses. logits float32 [N, E], read; weight float32 [N, K] and expert int64 [N, K], written."""

    logits: int
    weight: int
    expert: int


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "weight", "expert")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("experts", "top_k")),
    ]


def refuse_sizes(experts: int, top_k: int) -> None:
    """Raises BackendError for numbers of experts that the kernels of mixtures do not take."""
    if not 1 <= top_k <= min(experts, MOST_CHOSEN) or experts > MOST_EXPERTS:
        raise BackendError(
            f"The CUDA kernels for mixtures of experts choose up to {MOST_CHOSEN} of up to {MOST_EXPERTS} experts, not "
            f"{top_k} of {experts}. Build without plugins."
        )


def moe_gate_kernels(problem: GateProblem) -> tuple[Kernel, ...]:
    """What `launch_moe_gate` launches for any number of tokens."""
    return (Kernel("moe_gate.cu", "moe_gate", {"PER_LANE": -(-problem.experts // 32)}),)


def launch_moe_gate(launcher: Launcher, problem: GateProblem, tensors: GateTensors) -> None:
    """Weights that sum to one and expert numbers, best first; ties go to the lower number.

    A token with a NaN among its logits gets weights of NaN, and experts that exist and differ all the same.
    """
    if problem.tokens == 0:
        return
    params = _Params(tensors.logits, tensors.weight, tensors.expert, problem.tokens, problem.experts, problem.top_k)
    launcher.launch(
        moe_gate_kernels(problem)[0],
        grid=(-(-problem.tokens // _TOKENS_OF_BLOCK), 1, 1),
        threads=32 * _TOKENS_OF_BLOCK,
        shared_bytes=0,
        params=params,
    )
