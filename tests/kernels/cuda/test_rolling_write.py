"""Rolling attention's ring write, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.rolling_decode import decode_workspace_bytes, launch_decode
from runtime.kernels.cuda.rolling_write import launch_write
from tests.kernels.cuda import rolling_cases as cases
from tests.kernels.cuda.rolling_cases import RollingCase
from tests.kernels.cuda.rolling_write_cases import check_write, chunk, run_write, small_cases
from tests.support.kernel_devices import CpuDevice

CHUNK = chunk(6, 10, 5, ((3, 5), (18, 4)))


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in small_cases()])
def test_cases(case: RollingCase) -> None:
    check_write(CpuDevice(), case)


def test_padding_is_not_read() -> None:
    """Whatever the tokens hold that do not count, nothing of it is seen."""
    inputs = cases.inputs_of(CHUNK)
    plain = run_write(CpuDevice(), CHUNK, inputs)
    for array in (inputs.query_BTHD, inputs.key_BTGD, inputs.value_BTGD, inputs.cos_BTd, inputs.sin_BTd):
        array[1, 4] = np.nan
    spoilt = run_write(CpuDevice(), CHUNK, inputs)
    assert np.isfinite(spoilt.attended_BTHD.astype(np.float32)).all()
    for before, after in (
        (plain.attended_BTHD, spoilt.attended_BTHD),
        (plain.key_ring_BGSD, spoilt.key_ring_BGSD),
        (plain.value_ring_BGSD, spoilt.value_ring_BGSD),
    ):
        np.testing.assert_array_equal(before.astype(np.float32), after.astype(np.float32))


@pytest.mark.parametrize(
    ("activations", "ring", "largest"),
    [("bfloat16", "bfloat16", -np.inf), ("bfloat16", "float16", 70000.0), ("float16", "bfloat16", 65504.0)],
)
def test_what_a_ring_cannot_hold_is_no_number_in_it(activations: str, ring: str, largest: float) -> None:
    case = replace(CHUNK, activations=activations, ring=ring, interleaved=True)
    inputs = cases.inputs_of(case)
    inputs.value_BTGD[0, 2, 1, 3] = largest
    inputs.key_BTGD[1, 0, 0, 7] = np.nan
    results = run_write(CpuDevice(), case, inputs)
    assert np.isnan(results.value_ring_BGSD[0, 1, 5, 3].astype(np.float32))
    assert np.isnan(results.key_ring_BGSD[1, 0, 8, 6:8].astype(np.float32)).all()
    cases.check_rings(case, inputs, results)


@pytest.mark.parametrize("ring", ["bfloat16", "float8"])
def test_tokens_one_by_one_leave_what_a_chunk_leaves(ring: str) -> None:
    """Bit by bit, though another kernel writes them."""
    case = replace(CHUNK, ring=ring, starts=(8, 18), counts=(5, 5), interleaved=True)
    inputs = cases.inputs_of(case)
    whole = run_write(CpuDevice(), case, inputs)
    rings = inputs.key_ring_BGSD, inputs.value_ring_BGSD
    for t in range(case.tokens):
        now = slice(t, t + 1)
        inputs_of_step = cases.RollingInputs(
            inputs.query_BTHD[:, now],
            inputs.key_BTGD[:, now],
            inputs.value_BTGD[:, now],
            inputs.cos_BTd[:, now],
            inputs.sin_BTd[:, now],
            *rings,
        )
        step = replace(case, tokens=1, starts=(8 + t, 18 + t), counts=(1, 1))
        results = cases.run(CpuDevice(), step, inputs_of_step, launch_decode, decode_workspace_bytes)
        rings = results.key_ring_BGSD, results.value_ring_BGSD
    for one_by_one, at_once in zip(rings, (whole.key_ring_BGSD, whole.value_ring_BGSD), strict=True):
        np.testing.assert_array_equal(one_by_one.view(np.uint8), at_once.view(np.uint8))


def test_an_address_that_vectors_cannot_be_loaded_from_is_refused() -> None:
    device = CpuDevice()
    tensors = cases.upload(device, CHUNK, cases.inputs_of(CHUNK), 0).tensors
    with pytest.raises(BackendError, match="need cos at a multiple of 16 bytes"):
        launch_write(device.launcher, CHUNK.problem, replace(tensors, cos=tensors.cos + 4), tensors.attended)
