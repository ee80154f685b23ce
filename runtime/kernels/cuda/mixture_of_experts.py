"""MixtureOfExperts and QuantizedMixtureOfExperts on a GPU: `graph_passes.ops.moe` and `quantized_moe` define them.

Up to FEW_TOKENS tokens take one path and more of them another. Within a path a token's bits depend on its own x, its
own experts and the matrices' sizes alone: not on other tokens, nor on how many there are, nor on the device. Between
the paths they differ, since sums run in another order: over a warp's lanes in the first, 16 columns at a time on
tensor cores in the second. Both keep act(gate) ⊙ up in the type of x and everything else in float32; of packed
matrices the first multiplies scale · (q - zero) as it is, the second rounded to the type of x.

A weight of exactly zero: that expert is not looked at for that token. An expert number that is none, with a weight
other than zero, makes the token's row NaN. A token that names an expert twice has no defined result.
"""

from __future__ import annotations

from dataclasses import replace

from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.mixture_decode import decode_kernels, decode_workspace_bytes, launch_decode
from runtime.kernels.cuda.mixture_prefill import (
    every_prefill_kernel,
    launch_prefill,
    prefill_kernels,
    prefill_workspace_bytes,
)
from runtime.kernels.cuda.mixture_problem import FEW_TOKENS, MixtureProblem, MixtureTensors, PackedMatrices

__all__ = [
    "FEW_TOKENS",
    "MixtureProblem",
    "MixtureTensors",
    "PackedMatrices",
    "every_mixture_kernel",
    "launch_mixture_of_experts",
    "mixture_kernels",
    "mixture_workspace_bytes",
]


def mixture_workspace_bytes(problem: MixtureProblem, limits: DeviceLimits) -> int:
    """Enough for the problem and for every one with fewer tokens; what the workspace holds before does not matter."""
    few = replace(problem, tokens=min(problem.tokens, FEW_TOKENS))
    many = prefill_workspace_bytes(problem) if problem.tokens > FEW_TOKENS else 0
    return max(decode_workspace_bytes(few), many)


def mixture_kernels(problem: MixtureProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
    """What `launch_mixture_of_experts` launches for this number of tokens, in order."""
    if problem.tokens == 0:
        return ()
    return decode_kernels(problem) if problem.tokens <= FEW_TOKENS else prefill_kernels(problem, limits)


def every_mixture_kernel(problem: MixtureProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
    """What may be launched for up to `problem.tokens` tokens: what to compile where their number changes."""
    few = (replace(problem, tokens=tokens) for tokens in range(1, min(problem.tokens, FEW_TOKENS) + 1))
    many = every_prefill_kernel(problem, limits) if problem.tokens > FEW_TOKENS else ()
    return tuple(dict.fromkeys((*(kernel for case in few for kernel in decode_kernels(case)), *many)))


def launch_mixture_of_experts(launcher: Launcher, problem: MixtureProblem, tensors: MixtureTensors) -> None:
    """y[n] = Σ_k weight[n, k] · down_e(act(gate_e(x[n])) · up_e(x[n])) with e = expert[n, k], rounded once."""
    if problem.tokens == 0:
        return
    if problem.tokens <= FEW_TOKENS:
        launch_decode(launcher, problem, tensors)
    else:
        launch_prefill(launcher, problem, tensors)
