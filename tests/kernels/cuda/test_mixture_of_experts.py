"""MixtureOfExperts' CUDA kernels, on the CPU: few tokens and many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda import mixture_prefill
from runtime.kernels.cuda.launch import DeviceLimits
from runtime.kernels.cuda.mixture_of_experts import (
    FEW_TOKENS,
    MixtureProblem,
    every_mixture_kernel,
    mixture_kernels,
    mixture_workspace_bytes,
)
from runtime.kernels.cuda.mixture_problem import ACTIVATIONS
from tests.kernels.cuda.moe_cases import check_mixture, mixture, run_mixture, same_bits
from tests.support.cuda_cpu import LIMITS
from tests.support.kernel_devices import CpuDevice

PATHS = (FEW_TOKENS, FEW_TOKENS + 4)
"""Numbers of tokens on either path."""


@pytest.mark.parametrize(
    ("N", "element"),
    [*((N, "bfloat16") for N in (1, 2, 3, 8, 9, 31, 33)), (1, "float16"), (4, "float16"), (9, "float16")],
)
def test_numbers_of_tokens(N: int, element: str) -> None:
    check_mixture(CpuDevice(), mixture(N, 2, 4, 40, 24, element=element))


@pytest.mark.parametrize(("N", "K", "E"), [(1, 1, 1), (8, 16, 16), (8, 3, 40), (12, 16, 17), (9, 1, 256), (10, 3, 40)])
def test_numbers_of_experts(N: int, K: int, E: int) -> None:
    check_mixture(CpuDevice(), mixture(N, K, E, 16, 8))


@pytest.mark.parametrize(("C", "I"), [(8, 8), (264, 520), (136, 72), (8, 1600), (1040, 8)])
@pytest.mark.parametrize("N", [1, 5, 9])
def test_sizes(N: int, C: int, I: int) -> None:
    """Below, at and above what a warp takes at once, a tile has, and a row of down is split over."""
    check_mixture(CpuDevice(), mixture(N, 2, 3, C, I))


@pytest.mark.parametrize("split", [768, 1536, 3072, 6144])
def test_split_rows_of_down(split: int) -> None:
    for intermediate in (split - 8, split + 8):
        check_mixture(CpuDevice(), mixture(1, 2, 3, 8, intermediate))


@pytest.mark.parametrize("tokens", [63, 64, 65, 127, 128, 129])
def test_one_expert_taken_by_all(tokens: int) -> None:
    """Numbers of tokens around every tile's."""
    case = mixture(tokens, 1, 2, 24, 16)
    stacks = {name: np.nan_to_num(getattr(case, name)) for name in ("gate_EIC", "up_EIC", "down_ECI")}
    check_mixture(CpuDevice(), replace(case, expert_NK=np.ones_like(case.expert_NK), **stacks))


@pytest.mark.parametrize(("N", "K", "E"), [(1100, 2, 3), (600, 4, 5)])
def test_more_assignments_than_are_sorted_at_once(N: int, K: int, E: int) -> None:
    """A block of moe_route.cu looks at 1024 of them, and then at the next."""
    for seed in range(3):
        check_mixture(CpuDevice(seed=seed), mixture(N, K, E, 8, 8))


@pytest.mark.parametrize("shared_bytes", [99 << 10, 163 << 10])
def test_other_devices_give_the_same_bits(shared_bytes: int) -> None:
    """Fewer stages of the pipeline, and none too many for the device."""
    other = CpuDevice(DeviceLimits(4, shared_bytes, (8, 0)))
    for N in (12, 40, 200):
        case = mixture(N, 2, 4, 136, 40)
        same_bits(run_mixture(other, case), check_mixture(CpuDevice(), case))


@pytest.mark.parametrize(
    ("N", "activation"), [*((1, name) for name in ACTIVATIONS), (PATHS[1], "gelu"), (PATHS[1], "tanh")]
)
def test_activations(N: int, activation: str) -> None:
    """Both paths have them from the same file; `test_gated_activations.py` looks at the numbers themselves."""
    case = mixture(N, 2, 3, 24, 40, activation=activation, element="float16")
    check_mixture(CpuDevice(), case)
    check_mixture(CpuDevice(), replace(case, x_NC=case.x_NC / 64))
    check_mixture(CpuDevice(), replace(case, x_NC=case.x_NC * 3))


@pytest.mark.parametrize("N", [2, 12])
def test_expert_of_weight_zero_may_overflow(N: int) -> None:
    case = mixture(N, 2, 3, 24, 40, activation="relu2", element="float16")
    case = replace(case, x_NC=np.abs(case.x_NC))
    case.expert_NK[:] = [0, 1]
    case.weight_NK[:, 1] = 0
    for stack in (case.gate_EIC, case.up_EIC, case.down_ECI):
        stack[0] = np.nan_to_num(stack[0])
        stack[1] = 6e4
    check_mixture(CpuDevice(), case)
    case.weight_NK[0, 1] = 1e-3
    y = run_mixture(CpuDevice(), case).astype(np.float32)
    assert not np.isfinite(y[0]).any()
    assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize(("N", "C", "I"), [(1, 4096, 4136), (9, 2048, 4120)])
def test_matrices_beyond_32_bits(N: int, C: int, I: int) -> None:
    """The last of 256 experts begins at element 2^32 and more, or 2^31; only what is chosen has to be there."""
    case = mixture(N, 1, 1, C, I)
    same_bits(run_mixture(CpuDevice(), case, skipped=255), run_mixture(CpuDevice(), case))


@pytest.mark.parametrize("N", PATHS)
def test_tokens_without_any_weight(N: int) -> None:
    case = mixture(N, 2, 3, 24, 40)
    case.weight_NK[:] = 0
    assert not run_mixture(CpuDevice(), case).astype(np.float32).any()


@pytest.mark.parametrize("N", PATHS)
def test_nan_shows_in_its_token_alone(N: int) -> None:
    case = mixture(N, 2, 3, 24, 40)
    before = run_mixture(CpuDevice(), case)
    others = np.delete(np.arange(N), [1, 4, 6])
    case.x_NC[1, 23] = np.nan
    case.weight_NK[4, 1] = np.nan
    case.x_NC[6, 0] = np.inf
    after = run_mixture(CpuDevice(), case)
    assert np.isnan(after[[1, 4, 6]].astype(np.float32)).all()
    same_bits(after[others], before[others])


@pytest.mark.parametrize("N", PATHS)
@pytest.mark.parametrize("number", [-1, 3, 2**40, -(2**63)])
def test_experts_that_do_not_exist(N: int, number: int) -> None:
    """NaN for that token, unless the weight is zero; nothing is read that is not there."""
    case = mixture(N, 2, 3, 24, 40)
    before = run_mixture(CpuDevice(), case)
    case.expert_NK[2, 0] = number
    case.expert_NK[3, 1] = number  # its weight is zero
    after = run_mixture(CpuDevice(), case)
    assert case.weight_NK[3, 1] == 0
    assert np.isnan(after[2].astype(np.float32)).all()
    same_bits(np.delete(after, 2, axis=0), np.delete(before, 2, axis=0))


@pytest.mark.parametrize("tokens", [(8, 1, 2, 3, 5), (150, 9, 40)])
def test_rows_are_independent(tokens: tuple[int, ...]) -> None:
    """A token's bits are the same among other tokens, in another place, and in tiles of another size."""
    most = tokens[0]
    case = mixture(most, 3, 5, 72, 40)
    whole = run_mixture(CpuDevice(), case)
    rng = np.random.default_rng(3)
    for count in tokens[1:]:
        chosen = rng.permutation(most)[:count]
        same_bits(run_mixture(CpuDevice(), case.tokens(chosen)), whole[chosen])


@pytest.mark.parametrize("N", [1, 7, 140])
def test_order_of_threads_does_not_matter(N: int) -> None:
    case = mixture(N, 2, 4, 72, 136)
    same_bits(run_mixture(CpuDevice(seed=1), case), run_mixture(CpuDevice(seed=2), case))


def test_no_tokens() -> None:
    assert run_mixture(CpuDevice(), mixture(0, 2, 4, 16, 16)).shape == (0, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": 20}, "hidden size is 20"),
        ({"intermediate": 4}, "intermediate size is 4"),
        ({"activation": "swish"}, "swish"),
        ({"element": "float32"}, "float32"),
        ({"experts": 300}, "2 of 300"),
        ({"top_k": 5}, "5 of 4"),
        ({"tokens": 1 << 25}, "33554432"),
    ],
)
def test_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        replace(MixtureProblem(1, 16, 16, 4, 2, "silu", "bfloat16"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("N", [17, 40])
def test_very_many_tokens_go_in_slices_and_get_the_same_bits(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 16 tokens at most, all in the workspace of one, and the last one smaller."""
    case = mixture(N, 3, 5, 24, 40)
    whole = check_mixture(CpuDevice(), case)
    monkeypatch.setattr(mixture_prefill, "MOST_WORKSPACE", 0)
    monkeypatch.setattr(mixture_prefill, "_LEAST_SLICE", 16)
    same_bits(run_mixture(CpuDevice(), case), whole)
    of_one = mixture_workspace_bytes(replace(case.problem, tokens=16), LIMITS)
    assert mixture_workspace_bytes(case.problem, LIMITS) == of_one


@pytest.mark.parametrize("tokens", [2048, 8192, 1 << 20])
@pytest.mark.parametrize(("hidden", "intermediate", "experts", "top_k"), [(4096, 14336, 8, 2), (6144, 16384, 8, 2)])
def test_large_mixtures_need_little_workspace(
    tokens: int, hidden: int, intermediate: int, experts: int, top_k: int
) -> None:
    problem = MixtureProblem(tokens, hidden, intermediate, experts, top_k, "silu", "bfloat16")
    assert mixture_workspace_bytes(problem, LIMITS) <= mixture_prefill.MOST_WORKSPACE
    assert set(mixture_kernels(problem, LIMITS)) <= set(every_mixture_kernel(problem, LIMITS))


def test_one_build_serves_every_number_of_tokens() -> None:
    """Fewer tokens need no other kernels and no more workspace than the most do."""
    most = MixtureProblem(300, 64, 96, 4, 2, "silu", "bfloat16")
    kernels = set(every_mixture_kernel(most, LIMITS))
    for tokens in range(301):
        problem = replace(most, tokens=tokens)
        assert set(mixture_kernels(problem, LIMITS)) <= kernels
        assert mixture_workspace_bytes(problem, LIMITS) <= mixture_workspace_bytes(most, LIMITS)
