"""The best logits of each row, found by a CUDA kernel, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.top_logits import (
    TopProblem,
    TopTensors,
    launch_top_logits,
    top_logits_kernels,
    top_logits_workspace_bytes,
)
from tests.support.kernel_devices import CpuDevice, Device

Logits = npt.NDArray[np.float32]


def best(device: Device, logits_NV: Logits, k: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    problem = TopProblem(len(logits_NV), logits_NV.shape[1], k)
    logits = device.upload(logits_NV)
    values, ids = device.empty((problem.rows, k), np.float32), device.empty((problem.rows, k), np.int32)
    workspace = device.empty((top_logits_workspace_bytes(problem, device.launcher.limits),), np.uint8)
    launch_top_logits(
        device.launcher, problem, TopTensors(logits.address, values.address, ids.address, workspace.address)
    )
    device.download(workspace)  # looks at its guards
    return device.download(values), device.download(ids)


def check(logits_NV: Logits, k: int) -> None:
    values, ids = best(CpuDevice(), logits_NV, k)
    truth = np.argsort(-logits_NV, axis=1, kind="stable")[:, :k]  # NaN last, so not for rows that have one
    np.testing.assert_array_equal(ids, truth)
    np.testing.assert_array_equal(values, np.take_along_axis(logits_NV, truth, axis=1))


def _random(N: int, V: int) -> Logits:
    return np.random.default_rng([N, V]).standard_normal((N, V), dtype=np.float32)


@pytest.mark.parametrize("k", [1, 2, 63, 64])
@pytest.mark.parametrize("V", [64, 65, 1000, 4095, 4096, 4097, 8193, 20011])
def test_values_and_ids(V: int, k: int) -> None:
    check(_random(2, V), k)


def test_whole_vocabulary() -> None:
    for V in (1, 3, 64):
        check(_random(3, V), V)


def test_many_rows() -> None:
    check(_random(19, 5000), 5)


def test_more_levels_than_two() -> None:
    """More pieces than one block can take the best of."""
    V = 4096 * 70
    assert len(top_logits_kernels(TopProblem(1, V, 64))) == 3
    check(_random(1, V), 64)


@pytest.mark.parametrize("V", [300, 9000])
def test_ties_go_to_the_lower_id(V: int) -> None:
    rng = np.random.default_rng(V)
    check(np.zeros((2, V), np.float32), 64)
    check(rng.integers(0, 3, (2, V)).astype(np.float32), 64)
    check(np.where(rng.random((2, V)) < 0.5, np.float32(0), np.float32(-0.0)), 64)
    check(np.full((1, V), -np.inf, np.float32), 64)


def test_numbers_that_share_their_upper_bits() -> None:
    close = np.random.default_rng(0).permutation(10000).astype(np.uint32).reshape(1, -1)
    check((close + np.float32(1).view(np.uint32)).view(np.float32), 64)
    check(-(close + np.float32(1).view(np.uint32)).view(np.float32), 64)
    check((close + 1).view(np.float32), 64)


def test_infinite_and_extreme() -> None:
    logits = _random(1, 6000)
    logits[0, [5, 4000]] = np.inf
    logits[0, [6, 4100]] = np.finfo(np.float32).max
    logits[0, 7:4000] = -np.inf
    check(logits, 10)


@pytest.mark.parametrize("where", [0, 4095, 4096, 8999])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_comes_first_in_its_row_alone(where: int, sign: int) -> None:
    logits = _random(3, 9000)
    before = best(CpuDevice(), logits, 4)
    logits[1, where] = np.copysign(np.float32(np.nan), sign)
    logits[1, 1] = np.inf
    values, ids = best(CpuDevice(), logits, 4)
    assert list(ids[1, :2]) == [where, 1]
    np.testing.assert_array_equal(values[1, :2], [np.nan, np.inf])
    np.testing.assert_array_equal(values[[0, 2]], before[0][[0, 2]])
    np.testing.assert_array_equal(ids[[0, 2]], before[1][[0, 2]])


def test_order_of_threads_does_not_matter() -> None:
    logits = np.round(_random(2, 9000), 1)
    first, second = (best(CpuDevice(seed=seed), logits, 50) for seed in (1, 2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_no_rows() -> None:
    assert best(CpuDevice(), np.zeros((0, 100), np.float32), 3)[0].shape == (0, 3)


@pytest.mark.parametrize(("V", "k"), [(10, 11), (100, 65), (100, 0), (1 << 23, 1)])
def test_refused(V: int, k: int) -> None:
    with pytest.raises(BackendError, match=f"{k} of {V}"):
        TopProblem(1, V, k)


def test_every_piece_has_k_entries_at_least() -> None:
    """The kernel counts on it."""
    for V in (4097, 8193, 4096 * 64 + 1, 4096 * 511 + 1, 1 << 22, (1 << 22) - 4095):
        count = V
        while (chunks := -(-count // 4096)) > 1:
            assert count - (chunks - 1) * -(-count // chunks) >= 64
            count = chunks * 64
