"""Launches the second half of rolling attention over chunks: flash attention over rings that hold the chunk already."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.rolling_problem import RollingProblem, RollingTensors
from runtime.kernels.cuda.rolling_types import DEVICE_TYPES, TYPE_BYTES, VECTOR_BYTES, check_launch

MOST_POSITIONS = 2**30
"""Slots of a ring, as positions are told apart by their distance in 32 bits."""
MOST_RING_ROWS = 2**32
_MOST_HELD_DIM = 128
_FEW_ROWS = 64


@dataclass(frozen=True, slots=True)
class PrefillTiling:
    """How the kernel divides the work of one block.

    warps: of a block. row_blocks: blocks of 16 query rows of each warp; twice as many need half the loads of keys from
    shared memory, and twice the registers. keys: of a tile; a multiple of 16. held_queries: queries stay in registers,
    and give their shared memory to keys.
    """

    warps: int
    row_blocks: int
    keys: int
    held_queries: bool = False

    @property
    def query_rows(self) -> int:
        return 16 * self.warps * self.row_blocks

    def shared_bytes(self, problem: RollingProblem) -> int:
        """What a block needs, as rolling_prefill_tiles.cuh lays it out: two tiles are under way."""
        padded = 2 * problem.head_dim + VECTOR_BYTES
        queries = self.query_rows * padded
        if problem.ring == problem.activations:
            tiles = 4 * self.keys * padded
        else:
            tiles = 2 * self.keys * padded + 4 * self.keys * problem.head_dim * TYPE_BYTES[problem.ring]
        return max(queries, tiles) if self.held_queries else queries + tiles


def heads_of_block(problem: RollingProblem) -> int:
    """Query heads of one KV head that share a block's rows, so that fewer tokens, with a shorter edge, fill it."""
    group = problem.heads // problem.kv_heads
    return min(group & -group, 16)


def prefill_tiling(problem: RollingProblem, limits: DeviceLimits) -> PrefillTiling:
    """The first of these that suits the device's shared memory, with fewer rows where few tokens are there.

    Two blocks on a multiprocessor hide each other's waits, if a block has few warps with many rows each. Where they do
    not fit, one block has twice the warps. Wide heads leave registers for 16 rows of a warp only. How many keys a tile
    has, which last bits depend on, depends on the device and on sizes of the model alone.

    Raises BackendError where there is too little shared memory for any.
    """
    tiling = _full_tiling(problem, limits)
    if problem.tokens * heads_of_block(problem) <= _FEW_ROWS:
        return replace(tiling, warps=4, row_blocks=1)
    return tiling


def _full_tiling(problem: RollingProblem, limits: DeviceLimits) -> PrefillTiling:
    narrow = problem.head_dim <= _MOST_HELD_DIM
    pairs = [PrefillTiling(warps=4, row_blocks=2, keys=keys) for keys in (64, 32) if narrow]
    for tiling in pairs:
        if 2 * tiling.shared_bytes(problem) <= limits.shared_bytes:
            return tiling
    singles = [PrefillTiling(warps, 1, keys, held_queries=narrow) for warps in (8, 4) for keys in (64, 32, 16)]
    for tiling in singles:
        if tiling.shared_bytes(problem) <= limits.shared_bytes:
            return tiling
    raise BackendError(
        f"The CUDA kernel of RollingAttention's prefill needs {singles[-1].shared_bytes(problem)} bytes of shared "
        f"memory in a block for heads of {problem.head_dim} numbers, and the device has {limits.shared_bytes}. Build "
        "for another GPU, or without plugins."
    )


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key_ring", "value_ring", "attended", "start", "count")),
        ("scale_to_base_2", ctypes.c_float),
        *((name, ctypes.c_uint32) for name in ("batch", "tokens", "heads", "kv_heads", "slots", "window")),
        ("heads_shift", ctypes.c_uint32),
    ]


def _kernel(problem: RollingProblem, tiling: PrefillTiling) -> Kernel:
    definitions: dict[str, str | int] = {
        "HEAD_DIM": problem.head_dim,
        "ACTIVATION": DEVICE_TYPES[problem.activations],
        "RING": DEVICE_TYPES[problem.ring],
        "WARPS": tiling.warps,
        "ROW_BLOCKS": tiling.row_blocks,
        "KEY_TILE": tiling.keys,
        "HELD_QUERIES": int(tiling.held_queries),
    }
    return Kernel("rolling_prefill.cu", "rolling_prefill", definitions)


def rolling_prefill_kernels(problem: RollingProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
    """What `launch_rolling_prefill` launches for this number of tokens."""
    return (_kernel(problem, prefill_tiling(problem, limits)),)


def launch_rolling_prefill(
    launcher: Launcher,
    problem: RollingProblem,
    tensors: RollingTensors,
    query_address: int,
    tiling: PrefillTiling | None = None,
) -> None:
    """Attends with the rotated queries [B, T, H, D] at this address over rings that the chunk was written to.

    Tokens from `count` on give zeros, and their queries are not read; nor are slots that no token of a block sees. On
    one kind of device a token's bits depend on its own query and on what it sees alone: not on other rows or heads, nor
    on how its text was divided into chunks. tiling: other than the device's.

    Raises BackendError when a shape or an address does not suit the kernel.
    """
    check_launch(problem, tensors)
    _check_sizes(problem, query_address)
    tiling = tiling or prefill_tiling(problem, launcher.limits)
    heads = heads_of_block(problem)
    params = _Params(
        query=query_address,
        key_ring=tensors.key_ring,
        value_ring=tensors.value_ring,
        attended=tensors.attended,
        start=tensors.start,
        count=tensors.count,
        scale_to_base_2=problem.scale * math.log2(math.e),
        batch=problem.batch,
        tokens=problem.tokens,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        slots=problem.slots,
        window=problem.window or MOST_POSITIONS,
        heads_shift=heads.bit_length() - 1,
    )
    token_tiles = -(-problem.tokens // (tiling.query_rows // heads))
    launcher.launch(
        _kernel(problem, tiling),
        grid=(token_tiles * problem.batch * (problem.heads // heads), 1, 1),
        threads=32 * tiling.warps,
        shared_bytes=tiling.shared_bytes(problem),
        params=params,
    )


def _check_sizes(problem: RollingProblem, query_address: int) -> None:
    if problem.slots > MOST_POSITIONS or problem.batch * problem.kv_heads * problem.slots >= MOST_RING_ROWS:
        raise BackendError(
            f"The CUDA kernel of RollingAttention's prefill takes rings of at most {MOST_POSITIONS} slots and "
            f"{MOST_RING_ROWS} vectors, not {problem.batch} · {problem.kv_heads} · {problem.slots}. Lower the batch or "
            "the context."
        )
    if not 0 < problem.scale < math.inf:
        raise BackendError(
            f"The CUDA kernel of RollingAttention's prefill needs a positive scale, not {problem.scale}: it looks for "
            "the highest product, which must be the highest score. Build without plugins."
        )
    if query_address % VECTOR_BYTES:
        raise BackendError(
            f"The CUDA kernel of RollingAttention's prefill needs rotated queries at a multiple of {VECTOR_BYTES} "
            f"bytes, and they lie at {query_address:#x}."
        )
