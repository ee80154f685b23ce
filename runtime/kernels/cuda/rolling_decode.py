"""Launches rolling attention for one token a row: how the work is divided among blocks, and where their parts lie."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.rolling_problem import RollingProblem, RollingTensors
from runtime.kernels.cuda.rolling_types import DEVICE_TYPES, TYPE_BYTES, check_launch, token_strides

HEADS_OF_BLOCK = 16
"""Query heads of one KV head that share its keys and values; more take another block, which loads them again."""
HEADS_OF_WIDE_BLOCK, WIDE = 8, 192
"""As many as registers hold of a head dim from WIDE on, where two products' fragments are widened at once from e4m3."""
MOST_STAGES = 6
MOST_SPLITS = 4095
"""What the count of arrivals has room for."""
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How a problem is divided; numbers of `rolling_decode.cu`.

    heads: query heads of a block. blocks: that a KV head's take. splits: shares of a row's visible positions. warps:
    of a block. stages: of each warp's pipeline. resident: blocks that a multiprocessor is meant to hold at once.
    """

    heads: int
    blocks: int
    splits: int
    warps: int
    stages: int
    resident: int
    shared_bytes: int


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "cos", "sin", "key_ring", "value_ring")),
        *((name, ctypes.c_void_p) for name in ("start", "count", "attended", "partial", "statistics", "arrivals")),
        *((name, ctypes.c_uint32) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_uint32) for name in ("slots", "window", "kv_heads", "group", "blocks")),
        ("scale", ctypes.c_float),
    ]


@functools.lru_cache(maxsize=256)
def plan_decode(problem: RollingProblem, limits: DeviceLimits) -> DecodePlan:
    """The division for this device. Another device may get another one, and so other last bits of the result.

    It depends on the problem's sizes and the device alone: never on positions, nor on what a tensor holds.
    """
    group = problem.heads // problem.kv_heads
    wide = problem.head_dim >= WIDE and TYPE_BYTES[problem.ring] == 1
    blocks = -(-group // (HEADS_OF_WIDE_BLOCK if wide else HEADS_OF_BLOCK))
    heads = -(-group // blocks)
    warps, stages, resident = _pipeline(problem, limits, heads)
    splits = _splits(problem, limits.multiprocessors * resident, blocks, warps * _step(problem))
    rings = warps * stages * _stage_bytes(problem)
    return DecodePlan(
        heads=heads,
        blocks=blocks,
        splits=splits,
        warps=warps,
        stages=stages,
        resident=resident,
        shared_bytes=max(rings, splits * heads * 8) + _beside_rings(problem, heads),
    )


def decode_kernels(problem: RollingProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
    """The one kernel that a step needs."""
    return (_kernel(problem, plan_decode(problem, limits)),)


def decode_workspace_bytes(problem: RollingProblem, limits: DeviceLimits) -> int:
    """Room for what the splits hand over; none where a row is not split."""
    return _layout(problem, plan_decode(problem, limits))[-1]


def launch_decode(launcher: Launcher, problem: RollingProblem, tensors: RollingTensors) -> None:
    """One step of one token a row, as one kernel. The workspace may hold anything: nobody has to wipe it.

    Raises BackendError when the ring's shape or an address does not suit the kernel.
    """
    if problem.tokens != 1:
        raise BackendError(f"The decode kernel takes one token a row, not {problem.tokens}: chunks have another.")
    check_launch(problem, tensors)
    query_stride, key_stride, value_stride = token_strides(problem)
    plan = plan_decode(problem, launcher.limits)
    partial, statistics, arrivals, _ = _layout(problem, plan)
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
        attended=tensors.attended,
        partial=tensors.workspace + partial,
        statistics=tensors.workspace + statistics,
        arrivals=tensors.workspace + arrivals,
        query_stride=query_stride,
        key_stride=key_stride,
        value_stride=value_stride,
        slots=problem.slots,
        window=problem.window or problem.slots,
        kv_heads=problem.kv_heads,
        group=problem.heads // problem.kv_heads,
        blocks=plan.blocks,
        scale=problem.scale * math.log2(math.e),
    )
    launcher.launch(
        _kernel(problem, plan),
        grid=(plan.splits, problem.kv_heads * plan.blocks, problem.batch),
        threads=plan.warps * 32,
        shared_bytes=plan.shared_bytes,
        params=params,
    )


def _kernel(problem: RollingProblem, plan: DecodePlan) -> Kernel:
    definitions: dict[str, str | int] = {
        "HEAD_DIM": problem.head_dim,
        "HEADS": plan.heads,
        "ACTIVATION": DEVICE_TYPES[problem.activations],
        "RING": DEVICE_TYPES[problem.ring],
        "INTERLEAVED": int(problem.interleaved),
        "WARPS": plan.warps,
        "STAGES": plan.stages,
    }
    return Kernel("rolling_decode.cu", "rolling_decode", definitions)


def _step(problem: RollingProblem) -> int:
    """Keys that a warp takes at once: 16, or 32 of one byte an element, which fill the same room."""
    return 32 if TYPE_BYTES[problem.ring] == 1 else 16


def _stage_bytes(problem: RollingProblem) -> int:
    """Of a step's keys and values in shared memory; a key's 16-byte chunks are padded to an odd number."""
    chunks = problem.head_dim * TYPE_BYTES[problem.ring] // 16
    return 2 * _step(problem) * (chunks | 1) * 16


def _beside_rings(problem: RollingProblem, heads: int) -> int:
    """Rotated queries of whole eights of heads, the newest key and value, and a word that says who came last."""
    queries = -(-heads // 8) * 8 * (problem.head_dim + 8) * 2
    return queries + 2 * problem.head_dim * TYPE_BYTES[problem.ring] + 16


def _pipeline(problem: RollingProblem, limits: DeviceLimits, heads: int) -> tuple[int, int, int]:
    """Warps, stages and resident blocks: as many bytes under way as shared memory holds.

    A step has to wait for at least one other, so there are two stages at least. A block takes 1024 bytes of a
    multiprocessor's shared memory beside its own, one block's of which are beyond what a block may ask for.
    """
    beside = _beside_rings(problem, heads)
    for warps, resident in ((4, 2), (4, 1), (2, 1), (1, 1)):
        room = limits.shared_bytes // resident - 512 * (resident - 1) - beside
        stages = min(MOST_STAGES, room // (warps * _stage_bytes(problem)))
        if stages >= 2:
            return warps, stages, resident
    raise BackendError(
        f"{limits.shared_bytes} bytes of shared memory do not hold keys and values of {problem.head_dim} elements."
    )


def _splits(problem: RollingProblem, at_once: int, blocks: int, tile: int) -> int:
    """Shares that take the least time, if a full window is seen and a block's start and end cost what a tile does."""
    tiles = -(-(problem.window or problem.slots) // tile)
    rows = problem.batch * problem.kv_heads * blocks

    def cost(splits: int) -> int:
        return -(-rows * splits // at_once) * (-(-tiles // splits) + 1)

    return min(range(1, min(tiles, at_once, MOST_SPLITS) + 1), key=cost)


def _layout(problem: RollingProblem, plan: DecodePlan) -> tuple[int, int, int, int]:
    """Offsets in the workspace of partial, statistics and arrivals, and the end."""
    if plan.splits == 1:
        return 0, 0, 0, 0
    rows = problem.batch * problem.kv_heads * plan.blocks
    offsets = [0]
    for size in (rows * plan.splits * plan.heads * problem.head_dim * 4, rows * plan.splits * plan.heads * 8, rows * 8):
        offsets.append(-(-(offsets[-1] + size) // ALIGNMENT) * ALIGNMENT)
    partial, statistics, arrivals, end = offsets
    return partial, statistics, arrivals, end
