"""Launches the first half of rolling attention over chunks: RoPE, and the write of keys and values into their slots."""

from __future__ import annotations

import ctypes

from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.rolling_problem import RollingProblem, RollingTensors
from runtime.kernels.cuda.rolling_types import DEVICE_TYPES, TYPE_BYTES, check_launch, token_strides

THREADS = 128


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "cos", "sin", "key_ring", "value_ring")),
        *((name, ctypes.c_void_p) for name in ("start", "count", "rotated")),
        *((name, ctypes.c_uint32) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_uint32) for name in ("slots", "heads", "kv_heads")),
    ]


def rotated_query_bytes(problem: RollingProblem) -> int:
    """Of the rotated queries, [B, T, H, D] of the activations' type."""
    return problem.batch * problem.tokens * problem.heads * problem.head_dim * TYPE_BYTES[problem.activations]


def write_kernels(problem: RollingProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
    """The one kernel that a write needs, on every device."""
    definitions: dict[str, str | int] = {
        "HEAD_DIM": problem.head_dim,
        "ACTIVATION": DEVICE_TYPES[problem.activations],
        "RING": DEVICE_TYPES[problem.ring],
        "INTERLEAVED": int(problem.interleaved),
        "THREADS": THREADS,
    }
    return (Kernel("rolling_write.cu", "rolling_write", definitions),)


def launch_write(launcher: Launcher, problem: RollingProblem, tensors: RollingTensors, rotated_query: int) -> None:
    """Writes the rings' slots of the tokens that count, and the rotated queries of all to this address.

    Queries of padding become zeros. Raises BackendError when a shape or an address does not suit the kernel.
    """
    check_launch(problem, tensors)
    query_stride, key_stride, value_stride = token_strides(problem)
    params = _Params(
        query=tensors.query,
        key=tensors.key,
        value=tensors.value,
        cos=tensors.cos,
        sin=tensors.sin,
        key_ring=tensors.key_ring,
        value_ring=tensors.value_ring,
        start=tensors.start,
        count=tensors.count,
        rotated=rotated_query,
        query_stride=query_stride,
        key_stride=key_stride,
        value_stride=value_stride,
        slots=problem.slots,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
    )
    items = (problem.heads + 2 * problem.kv_heads) * (problem.head_dim // 16)
    (kernel,) = write_kernels(problem, launcher.limits)
    launcher.launch(
        kernel,
        grid=(problem.tokens, -(-items // THREADS), problem.batch),
        threads=THREADS,
        shared_bytes=0,
        params=params,
    )
