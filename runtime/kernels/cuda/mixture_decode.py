"""MixtureOfExperts for few tokens: dot products, each chosen expert's matrices read once."""

from __future__ import annotations

import ctypes

from runtime.kernels.cuda.launch import Kernel, Launcher
from runtime.kernels.cuda.mixture_problem import FEW_TOKENS, MixtureProblem, MixtureTensors

_SIZES = ("tokens", "top_k", "experts", "hidden_size", "intermediate", "block")
GATE_PARTS, UP_PARTS, DOWN_PARTS = (
    (f"{name}_numbers", f"{name}_scale", f"{name}_zero") for name in ("gate", "up", "down")
)
_UP_ROWS = 8  # of gate and of up in a block: 4 warps of 2
_DOWN_ROWS = 4
_DOWN_WARPS = 8
_SLOTS = 4 * 4 * 16  # bytes of shared memory for a thread: 4 steps, 4 rows
_MOST_ASSIGNMENTS = 128


class _UpParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "expert", *GATE_PARTS, *UP_PARTS, "hidden")),
        *((name, ctypes.c_uint32) for name in _SIZES),
    ]


class _DownParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "expert", *DOWN_PARTS, "y")),
        *((name, ctypes.c_uint32) for name in _SIZES),
    ]


def decode_workspace_bytes(problem: MixtureProblem) -> int:
    """hidden [N, K, I]."""
    return problem.assignments * problem.intermediate * 2


def decode_kernels(problem: MixtureProblem) -> tuple[Kernel, Kernel]:
    """What `launch_decode` launches, in order."""
    tokens = next(size for size in (1, 2, 4, FEW_TOKENS) if problem.tokens <= size)
    common: dict[str, str | int] = {**problem.definitions, "TOKENS": tokens}
    return (
        Kernel("moe_decode_up.cu", "moe_decode_up", {**common, "GATED_BY": problem.activation}),
        Kernel("moe_decode_down.cu", "moe_decode_down", {**common, "SPLIT": _split(problem)}),
    )


def _split(problem: MixtureProblem) -> int:
    """Warps that share a row of down, as many as leave three loads of 16 bytes to each lane. I and the type decide."""
    in_a_load = 128 // (problem.packed.bits if problem.packed else 16)
    return next(split for split in (8, 4, 2, 1) if split == 1 or problem.intermediate >= split * 32 * 3 * in_a_load)


def launch_decode(launcher: Launcher, problem: MixtureProblem, tensors: MixtureTensors) -> None:
    """Two launches. problem: of 1 to FEW_TOKENS tokens."""
    up, down = decode_kernels(problem)
    sizes = (problem.tokens, problem.top_k, problem.experts, problem.hidden, problem.intermediate, problem.block)
    hidden = tensors.workspace
    launcher.launch(
        up,
        grid=(-(-problem.intermediate // _UP_ROWS), problem.assignments, 1),
        threads=128,
        shared_bytes=_SLOTS * 128 + 4 * FEW_TOKENS,
        params=_UpParams(
            *(tensors.x, tensors.weight, tensors.expert),
            *(*tensors.gate_parts, *tensors.up_parts, hidden, *sizes),
        ),
    )
    choice = _MOST_ASSIGNMENTS * (4 + 4 + int(down.definitions["TOKENS"]))
    products = problem.assignments * _DOWN_ROWS * int(down.definitions["SPLIT"]) * 4
    launcher.launch(
        down,
        grid=(-(-problem.hidden // _DOWN_ROWS), 1, 1),
        threads=32 * _DOWN_WARPS,
        shared_bytes=_SLOTS * 32 * _DOWN_WARPS + choice + products,
        params=_DownParams(hidden, tensors.weight, tensors.expert, *tensors.down_parts, tensors.y, *sizes),
    )
