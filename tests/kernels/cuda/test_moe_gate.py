"""MoEGate's CUDA kernel, on the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.moe_gate import GateProblem
from tests.kernels.cuda.moe_cases import check_gate, run_gate
from tests.support.kernel_devices import CpuDevice

SIZES = [(1, 1, 1), (5, 8, 2), (4, 8, 8), (9, 33, 16), (2, 32, 3), (3, 256, 8), (2, 250, 16)]


def _logits(N: int, E: int) -> npt.NDArray[np.float32]:
    return 3 * np.random.default_rng([N, E]).standard_normal((N, E), dtype=np.float32)


@pytest.mark.parametrize(("N", "E", "K"), SIZES)
def test_spread_and_tied_logits(N: int, E: int, K: int) -> None:
    device, logits = CpuDevice(), _logits(N, E)
    check_gate(device, logits, K)
    check_gate(device, np.round(logits), K)
    check_gate(device, np.zeros_like(logits), K)
    check_gate(device, 60 + 1e-3 * logits, K)


def test_zeros_of_both_signs_tie() -> None:
    logits = np.zeros((1, 40), np.float32)
    logits[0, ::2] = -0.0
    check_gate(CpuDevice(), logits, 16)


def test_weights_that_vanish() -> None:
    """Beyond what exp reaches, and where all but one logit is -inf."""
    far = np.float32(-200) * np.arange(8, dtype=np.float32)[None]
    lone = np.full((1, 40), -np.inf, np.float32)
    lone[0, 37] = 5
    for logits in (far, lone):
        check_gate(CpuDevice(), logits, 3)


@pytest.mark.parametrize("where", [0, 31, 39])
def test_nan_shows_in_its_token_alone(where: int) -> None:
    logits = _logits(6, 40)
    alone, _ = run_gate(CpuDevice(), logits, 4)
    logits[2, where] = np.nan
    weight, expert = run_gate(CpuDevice(), logits, 4)
    assert np.isnan(weight[2]).all()
    assert len(set(expert[2]) & set(range(40))) == 4
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(weight[others], alone[others])


def test_all_nan_and_infinite() -> None:
    logits = np.full((2, 5), np.nan, np.float32)
    logits[1] = [0, np.inf, 1, 2, 3]
    weight, expert = run_gate(CpuDevice(), logits, 5)
    assert np.isnan(weight).all()
    np.testing.assert_array_equal(np.sort(expert, axis=1), np.tile(np.arange(5), (2, 1)))


def test_order_of_threads_does_not_matter() -> None:
    logits = _logits(7, 70)
    first, second = (run_gate(CpuDevice(seed=seed), logits, 5) for seed in (1, 2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_no_tokens() -> None:
    weight, expert = run_gate(CpuDevice(), np.zeros((0, 8), np.float32), 2)
    assert weight.shape == expert.shape == (0, 2)


@pytest.mark.parametrize(("E", "K"), [(257, 2), (32, 17), (4, 5), (4, 0)])
def test_refused(E: int, K: int) -> None:
    with pytest.raises(BackendError, match=f"{K} of {E}"):
        GateProblem(1, E, K)
