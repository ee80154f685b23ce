"""Launches RollingAttention: one kernel for a step of one token, and two, write and then attend, for a chunk."""

from __future__ import annotations

from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.rolling_decode import ALIGNMENT, decode_kernels, decode_workspace_bytes, launch_decode
from runtime.kernels.cuda.rolling_prefill import launch_rolling_prefill, rolling_prefill_kernels
from runtime.kernels.cuda.rolling_problem import RollingProblem, RollingTensors
from runtime.kernels.cuda.rolling_write import launch_write, rotated_query_bytes, write_kernels


def launch_rolling_attention(launcher: Launcher, problem: RollingProblem, tensors: RollingTensors) -> None:
    """Queues the op: afterwards the rings hold the chunk, and attended its result, zeros where a token does not count.

    The workspace may hold anything before, and nothing that it holds afterwards is needed again. What a row gets does
    not depend on other rows, and the same input gives the same bits on the same kind of device; other kinds may divide
    the positions differently, and a token fed alone goes another way than one in a chunk, so last bits may differ.

    Raises BackendError when a shape or an address does not suit the kernels.
    """
    if problem.tokens == 1:
        launch_decode(launcher, problem, tensors)
    else:
        launch_write(launcher, problem, tensors, rotated_query=tensors.workspace)
        launch_rolling_prefill(launcher, problem, tensors, query_address=tensors.workspace)


def rolling_attention_workspace_bytes(problem: RollingProblem, limits: DeviceLimits) -> int:
    """What the workspace must hold. It need not be wiped, and other kernels may use it between two calls."""
    if problem.tokens == 1:
        return decode_workspace_bytes(problem, limits)
    return -(-rotated_query_bytes(problem) // ALIGNMENT) * ALIGNMENT


def rolling_attention_kernels(problem: RollingProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
    """What `launch_rolling_attention` launches, to be compiled ahead."""
    if problem.tokens == 1:
        return decode_kernels(problem, limits)
    return (*write_kernels(problem, limits), *rolling_prefill_kernels(problem, limits))
