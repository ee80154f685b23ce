"""Rolling attention as a whole, on the CPU: which kernels a call takes, and a text that is fed in chunks and tokens."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.rolling_attention import (
    launch_rolling_attention,
    rolling_attention_kernels,
    rolling_attention_workspace_bytes,
)
from tests.kernels.cuda import rolling_cases as cases
from tests.kernels.cuda.rolling_cases import RollingCase
from tests.support.kernel_devices import CpuDevice

LIMITS = DeviceLimits(multiprocessors=60, shared_bytes=227 << 10, compute_capability=(9, 0))
TEXT = RollingCase(window=100, slots=140, starts=(0, 350), counts=(40, 37), tokens=40)


class RecordingLauncher:
    """Says which kernels it has launched."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.launched: list[Kernel] = []

    @property
    def limits(self) -> DeviceLimits:
        return self._launcher.limits

    def launch(
        self, kernel: Kernel, *, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        self.launched.append(kernel)
        self._launcher.launch(kernel, grid=grid, threads=threads, shared_bytes=shared_bytes, params=params)


@pytest.mark.parametrize(
    ("tokens", "names"), [(1, ["rolling_decode"]), (2, ["rolling_write", "rolling_prefill"])], ids=["token", "chunk"]
)
def test_the_kernels_to_prepare_are_those_launched(tokens: int, names: list[str]) -> None:
    case = replace(TEXT, tokens=tokens, counts=(tokens, 1))
    device = CpuDevice(LIMITS)
    recorder = RecordingLauncher(device.launcher)
    size = rolling_attention_workspace_bytes(case.problem, LIMITS)
    buffers = cases.upload(device, case, cases.inputs_of(case), size)
    launch_rolling_attention(recorder, case.problem, buffers.tensors)
    assert [kernel.name for kernel in recorder.launched] == names
    assert tuple(recorder.launched) == rolling_attention_kernels(case.problem, LIMITS)


@pytest.mark.parametrize("ring", ["bfloat16", "float8"])
def test_a_text_in_chunks_and_tokens(ring: str) -> None:
    """Each call goes on from the rings that the last one left; one row has nothing to feed for a while."""
    device = CpuDevice(LIMITS)
    rings = None
    starts = np.array(TEXT.starts)
    for number, counts in enumerate(((40, 37), (1, 1), (1, 0), (40, 3), (1, 1), (39, 40), (1, 1))):
        tokens = 1 if max(counts) == 1 else TEXT.tokens
        case = replace(TEXT, ring=ring, starts=tuple(starts.tolist()), counts=counts, tokens=tokens, seed=number)
        inputs = cases.inputs_of(case)
        if rings is not None:
            inputs = replace(inputs, key_ring_BGSD=rings[0], value_ring_BGSD=rings[1])
        results = cases.run(device, case, inputs, launch_rolling_attention, rolling_attention_workspace_bytes)
        cases.check_rings(case, inputs, results)
        cases.check_attended(case, inputs, results)
        rings = results.key_ring_BGSD, results.value_ring_BGSD
        starts += counts
