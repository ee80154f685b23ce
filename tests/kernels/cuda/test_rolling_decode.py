"""Rolling attention's decode kernel, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits
from runtime.kernels.cuda.rolling_decode import decode_workspace_bytes, launch_decode, plan_decode
from tests.kernels.cuda import rolling_cases as cases
from tests.kernels.cuda.rolling_cases import RollingCase, RollingInputs, RollingResults
from tests.kernels.cuda.rolling_decode_cases import check_decode, small_cases, step
from tests.support.kernel_devices import CpuDevice

HOPPER_BYTES, ADA_BYTES = 227 << 10, 99 << 10
MANY = DeviceLimits(multiprocessors=60, shared_bytes=HOPPER_BYTES, compute_capability=(9, 0))
"""A device that small problems do not fill: each row is split as far as its tiles go."""
ONE = replace(MANY, multiprocessors=1)
SPLIT = step(300, 310, (10, 150, 299, 800))
"""A row of one tile, of three and of five, for as many shares as a full window has tiles."""


def run(device: CpuDevice, case: RollingCase, inputs: RollingInputs) -> RollingResults:
    return cases.run(device, case, inputs, launch_decode, decode_workspace_bytes)


@pytest.mark.parametrize("limits", [MANY, ONE], ids=["split", "whole"])
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in small_cases()])
def test_cases(case: RollingCase, limits: DeviceLimits) -> None:
    assert plan_decode(case.problem, ONE).splits == 1
    check_decode(CpuDevice(limits), case)


def test_shares_of_a_row_without_a_tile() -> None:
    plan = plan_decode(SPLIT.problem, MANY)
    assert (plan.splits, plan.warps) == (5, 4)
    check_decode(CpuDevice(MANY), SPLIT)


@pytest.mark.parametrize(("shared_bytes", "warps", "resident"), [(ADA_BYTES, 2, 1), (163 << 10, 4, 1)])
def test_shared_memory_decides_the_pipeline(shared_bytes: int, warps: int, resident: int) -> None:
    case = step(70, 75, (20, 190), head_dim=256, kv_heads=1, heads=2)
    limits = replace(MANY, shared_bytes=shared_bytes)
    plan = plan_decode(case.problem, limits)
    assert (plan.warps, plan.resident) == (warps, resident)
    assert plan.stages >= 2
    assert plan.shared_bytes <= shared_bytes
    check_decode(CpuDevice(limits), case)


def test_mistral_on_hopper_fills_the_device_with_whole_pipelines() -> None:
    limits = DeviceLimits(multiprocessors=132, shared_bytes=HOPPER_BYTES, compute_capability=(9, 0))
    for batch, splits in ((1, 32), (8, 4), (32, 1)):
        problem = step(4096, 4096, (0,) * batch, heads=32, kv_heads=8, head_dim=128).problem
        plan = plan_decode(problem, limits)
        assert (plan.heads, plan.warps, plan.stages, plan.resident, plan.splits) == (4, 4, 3, 2, splits)


def test_the_order_of_blocks_and_threads_does_not_matter() -> None:
    inputs = cases.inputs_of(SPLIT)
    first, *others = (run(CpuDevice(MANY, seed=seed), SPLIT, inputs) for seed in range(6))
    for other in others:
        np.testing.assert_array_equal(first.attended_BTHD, other.attended_BTHD)


def test_rows_do_not_know_of_each_other() -> None:
    inputs = cases.inputs_of(SPLIT)
    device = CpuDevice(MANY)
    alone = run(device, SPLIT, inputs).attended_BTHD
    for array in (inputs.query_BTHD, inputs.key_BTGD, inputs.value_BTGD, inputs.key_ring_BGSD, inputs.value_ring_BGSD):
        array[[0, 1, 3]] *= np.array(-3, array.dtype)
    changed = replace(SPLIT, starts=(200, 0, 299, 5), counts=(1, 1, 1, 0))
    np.testing.assert_array_equal(run(device, changed, inputs).attended_BTHD[2], alone[2])


@pytest.mark.parametrize("bits", [0, 0xFF, None])
def test_a_workspace_may_hold_anything_and_is_used_again(bits: int | None) -> None:
    """Also what another problem left there; two calls in a row, the second with other numbers."""
    device = CpuDevice(MANY)
    size = decode_workspace_bytes(SPLIT.problem, MANY)
    rng = np.random.default_rng(1)
    content = rng.integers(0, 256, size, np.uint8) if bits is None else np.full(size, bits, np.uint8)
    workspace = device.upload(content)
    for case in (SPLIT, replace(SPLIT, seed=1), replace(SPLIT, heads=2, kv_heads=1, seed=2), replace(SPLIT, seed=3)):
        inputs = cases.inputs_of(case)
        buffers = cases.upload(device, case, inputs, size, workspace)
        launch_decode(device.launcher, case.problem, buffers.tensors)
        results = buffers.download(device)
        cases.check_rings(case, inputs, results)
        cases.check_attended(case, inputs, results)


@pytest.mark.parametrize("ring", ["bfloat16", "float8"])
@pytest.mark.parametrize("position", [501, 600, 799])
def test_what_is_no_number_shows(ring: str, position: int) -> None:
    """A key that is none makes all of its heads' results none; an element of a value, its own element of them."""
    case = replace(SPLIT, ring=ring, interleaved=ring != "bfloat16")
    inputs = cases.inputs_of(case)
    inputs.key_ring_BGSD[3, 0, position % case.slots, 5] = np.nan
    inputs.value_ring_BGSD[3, 1, position % case.slots, 9] = np.nan
    results = run(CpuDevice(MANY), case, inputs)
    cases.check_attended(case, inputs, results)
    missing = np.isnan(results.attended_BTHD.astype(np.float32))
    assert missing[3, 0, :2].all()
    assert missing[3, 0, 2:, 9].all()
    assert missing.sum() == 2 * case.head_dim + 2


def test_a_query_that_is_no_number_shows() -> None:
    inputs = cases.inputs_of(SPLIT)
    inputs.query_BTHD[1, 0, 2, 3] = np.nan
    results = run(CpuDevice(MANY), SPLIT, inputs)
    cases.check_attended(SPLIT, inputs, results)
    assert np.isnan(results.attended_BTHD[1, 0, 2].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("activations", "ring", "largest"),
    [
        ("bfloat16", "bfloat16", np.inf),
        ("bfloat16", "float16", 70000.0),
        ("bfloat16", "float8", 480.0),
        ("float16", "bfloat16", 65504.0),  # which bfloat16 rounds to 65536
        ("float16", "float8", -480.0),
    ],
)
def test_what_a_ring_cannot_hold_is_no_number_in_it(activations: str, ring: str, largest: float) -> None:
    case = replace(SPLIT, activations=activations, ring=ring, starts=(5,), counts=(1,), interleaved=True)
    inputs = cases.inputs_of(case)
    inputs.value_BTGD[0, 0, 1, 3] = largest
    results = run(CpuDevice(MANY), case, inputs)
    assert np.isnan(results.value_ring_BGSD[0, 1, 5, 3].astype(np.float32))
    assert np.isnan(results.attended_BTHD[0, 0, 2:, 3].astype(np.float32)).all()
    cases.check_rings(case, inputs, results)
    cases.check_attended(case, inputs, results)


def test_values_of_a_constant_come_out_as_they_went_in() -> None:
    """Weights are divided by the sum of what they were rounded to."""
    inputs = cases.inputs_of(SPLIT)
    for array in (inputs.value_BTGD, inputs.value_ring_BGSD):
        array[...] = 1.5
    attended = run(CpuDevice(MANY), SPLIT, inputs).attended_BTHD
    np.testing.assert_array_equal(attended, np.full(attended.shape, 1.5, ml_dtypes.bfloat16))


def test_what_is_refused() -> None:
    device = CpuDevice(MANY)
    case = replace(SPLIT, starts=(5,), counts=(1,))
    tensors = cases.upload(device, case, cases.inputs_of(case), decode_workspace_bytes(case.problem, MANY)).tensors
    with pytest.raises(BackendError, match="one token a row, not 2"):
        launch_decode(device.launcher, replace(case.problem, tokens=2), tensors)
    with pytest.raises(BackendError, match="need key_ring at a multiple of 16 bytes"):
        launch_decode(device.launcher, case.problem, replace(tensors, key_ring=tensors.key_ring + 8))
    for stride in (60, 68):  # less than a token has, and not a multiple of eight
        with pytest.raises(BackendError, match=f"a query every 64 to .* one every {stride}"):
            launch_decode(device.launcher, replace(case.problem, query_stride=stride), tensors)
    with pytest.raises(BackendError, match="at most 2147483647 slots"):
        launch_decode(device.launcher, replace(case.problem, slots=2**31), tensors)
    with pytest.raises(BackendError, match="do not hold keys and values of 16"):
        plan_decode(case.problem, replace(MANY, shared_bytes=3072))


@pytest.mark.parametrize("seed", range(3))
def test_more_shares_than_stages_have_room_for(seed: int) -> None:
    """Their statistics reach over the word that says who merges; with queries of zeros, scores are zeros there."""
    case = step(9300, 9300, (9299,), heads=16, kv_heads=1, ring="float8")
    limits = DeviceLimits(multiprocessors=80, shared_bytes=20 << 10, compute_capability=(9, 0))
    plan = plan_decode(case.problem, limits)
    stages = plan.warps * plan.stages * 2 * 32 * 16
    assert plan.splits * plan.heads * 8 > stages + 16 * 24 * 2 + 2 * 16
    inputs = cases.inputs_of(case)
    inputs.query_BTHD[...] = 0
    device = CpuDevice(limits, seed=seed)
    cases.check_attended(case, inputs, run(device, case, inputs))
