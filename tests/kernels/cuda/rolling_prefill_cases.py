"""Cases of rolling attention over chunks, on any device: rolling_cases.py with the tiling that a case asks for.

What a chunk wrote to the rings is read back from there, so cases run the write and then the attention, but where only
the attention has something new to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.kernels.cuda.launch import DeviceLimits, Launcher
from runtime.kernels.cuda.rolling_prefill import PrefillTiling, launch_rolling_prefill
from runtime.kernels.cuda.rolling_problem import RollingProblem, RollingTensors
from runtime.kernels.cuda.rolling_write import launch_write, rotated_query_bytes
from tests.kernels.cuda import rolling_cases
from tests.kernels.cuda.rolling_cases import Array, RollingCase, RollingInputs, RollingResults
from tests.support.kernel_devices import Device

SMALL = PrefillTiling(warps=2, row_blocks=1, keys=16)
"""Blocks of 32 rows, so that a few tokens have several blocks and several tiles."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Write and attend, with a tiling or the device's own."""

    tiling: PrefillTiling | None

    def __call__(self, launcher: Launcher, problem: RollingProblem, tensors: RollingTensors) -> None:
        launch_write(launcher, problem, tensors, rotated_query=tensors.workspace)
        launch_rolling_prefill(launcher, problem, tensors, tensors.workspace, self.tiling)


def workspace_bytes(problem: RollingProblem, limits: DeviceLimits) -> int:
    return rotated_query_bytes(problem)


def check(device: Device, case: RollingCase, tiling: PrefillTiling | None = SMALL) -> None:
    rolling_cases.check(device, case, Chunk(tiling), workspace_bytes)


def check_attention(device: Device, case: RollingCase, tiling: PrefillTiling | None = SMALL) -> None:
    """The second half alone: numpy turns and writes. Queries that do not count hold NaN."""
    inputs = rolling_cases.inputs_of(case)
    query = rolling_cases.rotated_query(case, inputs)
    for row, count in enumerate(case.counts):
        query[row, count:] = np.nan
    key_ring, value_ring = rolling_cases.rings_after(case, inputs)
    given = replace(inputs, query_BTHD=query, key_ring_BGSD=key_ring, value_ring_BGSD=value_ring)
    buffers = rolling_cases.upload(device, case, given, 0)
    launch_rolling_prefill(device.launcher, case.problem, buffers.tensors, buffers.tensors.query, tiling)
    rolling_cases.check_attended(case, inputs, buffers.download(device))


def run(
    device: Device, case: RollingCase, inputs: RollingInputs, tiling: PrefillTiling | None = SMALL
) -> RollingResults:
    return rolling_cases.run(device, case, inputs, Chunk(tiling), workspace_bytes)


def window_cases() -> dict[str, RollingCase]:
    """Chunks shorter than, as long as and longer than the window; windows within a tile and over several.

    A block of SMALL has 16 tokens of two heads, and 16 keys in a tile.
    """
    cases = {}
    for window in (1, 3, 16, 50):
        for tokens in sorted({max(2, window // 2), max(2, window), window + 5, 33}):
            starts = (0, window - 1, 3 * window + 7, 2**31 + 5)
            counts = (tokens, tokens, tokens - 1, tokens)
            case = RollingCase(window, window + tokens - 1, starts, counts, tokens)
            cases[f"window-{window}-tokens-{tokens}"] = case
            cases[f"window-{window}-tokens-{tokens}-spare-slots"] = replace(case, slots=case.slots + 13)
    cases["full-attention-of-all"] = RollingCase(0, 40, (0,), (40,), 40)
    cases["full-attention"] = RollingCase(0, 80, (0, 30, 61), (19, 19, 19), 19)
    return cases


def row_cases() -> dict[str, RollingCase]:
    """Rows that are idle or partly padded, and blocks of tokens none of which counts."""
    case = RollingCase(20, 60, (0, 100, 45, 7), (0, 33, 1, 17), 37)
    return {"counts": case, "all-idle": replace(case, counts=(0, 0, 0, 0))}


def head_cases() -> dict[str, RollingCase]:
    """Query heads for each KV head, whose power of two shares a block's rows."""
    case = RollingCase(20, 45, (50,), (19,), 22)
    heads = ((1, 1), (3, 3), (4, 2), (3, 1), (8, 2), (12, 2), (8, 1), (16, 1), (32, 1))
    return {f"heads-{h}-{g}": replace(case, heads=h, kv_heads=g) for h, g in heads}


def type_cases() -> dict[str, RollingCase]:
    case = RollingCase(20, 45, (50, 0), (21, 9), 22)
    pairs = (
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float8"),
        ("float16", "float8"),
        ("bfloat16", "float16"),
        ("float16", "bfloat16"),
    )
    return {f"{a}-{r}": replace(case, activations=a, ring=r) for a, r in pairs}


def size_cases() -> dict[str, tuple[RollingCase, DeviceLimits]]:
    """Head dims with the tilings that devices of each size of shared memory get; several tiles and several blocks."""
    case = RollingCase(70, 70 + 47, (300,), (45,), 47, heads=4, kv_heads=1)
    few = RollingCase(70, 70 + 4, (300, 0), (5, 3), 5, heads=8, kv_heads=2)
    sizes = {
        "hopper": DeviceLimits(132, 227 << 10, (9, 0)),
        "ampere": DeviceLimits(108, 163 << 10, (8, 0)),
        "ada": DeviceLimits(128, 99 << 10, (8, 9)),
    }
    chosen = (
        *((128, name) for name in sizes),
        (64, "hopper"),
        (80, "ada"),
        (256, "ada"),
    )
    cases = {f"{dim}-{name}": (replace(case, head_dim=dim), sizes[name]) for dim, name in chosen}
    cases["128-ada-float8"] = (replace(case, head_dim=128, ring="float8", heads=2), sizes["ada"])
    cases["128-hopper-few-tokens"] = (replace(few, head_dim=128), sizes["hopper"])
    return cases


# -- what is not a number --


def check_faults_are_seen_where_they_are(device: Device, tiling: PrefillTiling = SMALL) -> None:
    """NaN in keys and values of the ring and of the chunk: all who see them get NaN, nobody else does.

    A key makes all numbers of its head NaN, a value one of them.
    """
    case = RollingCase(20, 60, (200, 0), (30, 21), 33)
    inputs = rolling_cases.inputs_of(case)
    inputs.key_ring_BGSD[0, 0, 193 % 60, 3] = np.nan
    inputs.value_ring_BGSD[0, 1, 197 % 60, 5] = np.nan
    inputs.value_ring_BGSD[0, 0, 186 % 60, 15] = np.nan
    inputs.value_BTGD[0, 9, 1, 0] = np.nan
    inputs.value_BTGD[0, 17, 1, 9] = np.inf  # the ring cannot hold it
    inputs.key_BTGD[1, 16, 0, 2] = np.nan
    results = run(device, case, inputs, tiling)
    rolling_cases.check_attended(case, inputs, results)
    nan = np.isnan(results.attended_BTHD.astype(np.float32))
    np.testing.assert_array_equal(nan[0, :, 0].all(-1), np.arange(33) < 13)
    np.testing.assert_array_equal(nan[0, :, 2, 0], (np.arange(33) >= 9) & (np.arange(33) < 29))
    np.testing.assert_array_equal(nan[1, :, 0].any(-1), (np.arange(33) >= 16) & (np.arange(33) < 21))


def check_query_faults_stay(device: Device) -> None:
    """A query that is NaN is nobody else's trouble."""
    case = RollingCase(20, 60, (200,), (21,), 21)
    inputs = rolling_cases.inputs_of(case)
    inputs.query_BTHD[0, 4, 1, 7] = np.nan
    nan = np.isnan(run(device, case, inputs).attended_BTHD.astype(np.float32))
    assert nan[0, 4, 1].all()
    assert nan.sum() == case.head_dim


# -- what bits depend on --


def attended_of_text(device: Device, case: RollingCase, steps: Sequence[int], tiling: PrefillTiling | None) -> Array:
    """A row's text in chunks of these sizes, after what its ring holds: [tokens, H, D]."""
    inputs = rolling_cases.inputs_of(replace(case, starts=case.starts[:1], counts=case.counts[:1]))
    rings = inputs.key_ring_BGSD, inputs.value_ring_BGSD
    results, begin = [], 0
    for size in steps:
        chunk = slice(begin, begin + size)
        step = replace(case, starts=(case.starts[0] + begin,), counts=(size,), tokens=size)
        given = RollingInputs(
            inputs.query_BTHD[:, chunk],
            inputs.key_BTGD[:, chunk],
            inputs.value_BTGD[:, chunk],
            inputs.cos_BTd[:, chunk],
            inputs.sin_BTd[:, chunk],
            *rings,
        )
        result = run(device, step, given, tiling)
        rings = result.key_ring_BGSD, result.value_ring_BGSD
        results.append(result.attended_BTHD[0])
        begin += size
    return np.concatenate(results)


def check_chunks_do_not_matter(device: Device, tiling: PrefillTiling | None) -> None:
    case = RollingCase(37, 37 + 63, (101,), (64,), 64)
    whole = attended_of_text(device, case, (64,), tiling)
    for steps in ((32, 32), (7, 50, 7), (21, 2, 41)):
        same_bits(attended_of_text(device, case, steps, tiling), whole)


def check_rows_do_not_matter(device: Device) -> None:
    """A row beside others, whose ring is full of NaN, and alone."""
    case = RollingCase(20, 60, (200, 5, 33), (19, 23, 0), 23)
    inputs = rolling_cases.inputs_of(case)
    together = run(device, case, inputs).attended_BTHD[1]
    inputs.key_ring_BGSD[0] = inputs.value_ring_BGSD[2] = np.nan
    same_bits(run(device, case, inputs).attended_BTHD[1], together)
    own = RollingInputs(*(getattr(inputs, name)[1:2] for name in RollingInputs.__slots__))
    same_bits(run(device, replace(case, starts=(5,), counts=(23,)), own).attended_BTHD[0], together)


def same_bits(left: Array, right: Array) -> None:
    np.testing.assert_array_equal(left.view(np.uint16), right.view(np.uint16))
