"""Kernels that stand for all that a build may ask for: models of the Mistral family, and the corners of each kernel.

What launchers choose depends on a GPU's limits, so the list is made for one architecture at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtime.kernels.cuda.launch import DeviceLimits, Kernel
from runtime.kernels.cuda.mixture_of_experts import mixture_kernels
from runtime.kernels.cuda.mixture_problem import MixtureProblem, PackedMatrices
from runtime.kernels.cuda.moe_gate import GateProblem, moe_gate_kernels
from runtime.kernels.cuda.rolling_attention import rolling_attention_kernels
from runtime.kernels.cuda.rolling_problem import RollingProblem
from runtime.kernels.cuda.top_logits import TopProblem, top_logits_kernels

TYPICAL_LIMITS = {
    (8, 0): DeviceLimits(multiprocessors=108, shared_bytes=163 << 10, compute_capability=(8, 0)),  # A100
    (8, 6): DeviceLimits(multiprocessors=84, shared_bytes=99 << 10, compute_capability=(8, 6)),  # A10, RTX 3090
    (8, 9): DeviceLimits(multiprocessors=142, shared_bytes=99 << 10, compute_capability=(8, 9)),  # L40S
    (9, 0): DeviceLimits(multiprocessors=132, shared_bytes=227 << 10, compute_capability=(9, 0)),  # H100
    (12, 0): DeviceLimits(multiprocessors=170, shared_bytes=99 << 10, compute_capability=(12, 0)),  # RTX 5090
}
"""Per compute capability, of a GPU that is often met; shared memory is the same on all (CUDA C++ Programming Guide,
table of technical specifications per compute capability)."""


def representative_kernels(compute_capability: tuple[int, int]) -> tuple[Kernel, ...]:
    """Each once, in the order of their launchers. Raises KeyError for what is not in TYPICAL_LIMITS."""
    limits = TYPICAL_LIMITS[compute_capability]
    kernels = [kernel for problem in _attention() for kernel in rolling_attention_kernels(problem, limits)]
    kernels += [kernel for experts in (8, 60, 256) for kernel in moe_gate_kernels(GateProblem(1, experts, 2))]
    kernels += [kernel for problem in _mixtures() for kernel in mixture_kernels(problem, limits)]
    kernels += [kernel for vocabulary in (100, 32768) for kernel in top_logits_kernels(TopProblem(1, vocabulary, 50))]
    return tuple(dict.fromkeys(kernels))


def _attention() -> Iterator[RollingProblem]:
    """Decode and prefill: Mistral 7B's shape in several types, other head dims, other ways to share KV heads."""
    for tokens in (1, 512):
        for activations, ring in (
            *(("bfloat16", "bfloat16"), ("float16", "float16")),
            *(("bfloat16", "float8"), ("bfloat16", "float16")),
        ):
            yield _attention_problem(tokens, activations=activations, ring=ring)
        for head_dim in (16, 64, 80, 112, 192, 256):
            yield _attention_problem(tokens, head_dim=head_dim)
        for group in (1, 16):
            yield _attention_problem(tokens, heads=2 * group, kv_heads=2)
        yield _attention_problem(tokens, interleaved=True)


def _attention_problem(
    tokens: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    interleaved: bool = False,
    activations: str = "bfloat16",
    ring: str = "bfloat16",
) -> RollingProblem:
    return RollingProblem(
        batch=8,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        slots=4096 + 512,
        window=4096,
        scale=head_dim**-0.5,
        interleaved=interleaved,
        activations=activations,
        ring=ring,
    )


def _mixtures() -> Iterator[MixtureProblem]:
    """Mixtral 8x7B in both types and quantized, and many small experts with another activation."""
    int4 = PackedMatrices(bits=4, block=32, scales="float16", zero_points=True)
    int8 = PackedMatrices(bits=8, block=32, scales="float32", zero_points=False)
    for tokens in (1, 2, 4, 8, 16, 128, 2048):
        yield MixtureProblem(tokens, 4096, 14336, 8, 2, "silu", "bfloat16")
    for tokens in (1, 2048):
        yield MixtureProblem(tokens, 4096, 14336, 8, 2, "silu", "float16")
        yield MixtureProblem(tokens, 4096, 14336, 8, 2, "silu", "bfloat16", int4)
        yield MixtureProblem(tokens, 4096, 14336, 8, 2, "silu", "float16", int8)
        yield MixtureProblem(tokens, 2048, 1408, 60, 4, "gelu_tanh", "bfloat16")
