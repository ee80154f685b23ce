"""The kernels of mixtures of experts and of sampling, on the device at hand, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from runtime.kernels.cuda.mixture_of_experts import FEW_TOKENS, PackedMatrices
from runtime.kernels.cuda.mixture_problem import ACTIVATIONS
from runtime.kernels.cuda.top_logits import (
    TopProblem,
    TopTensors,
    launch_top_logits,
    top_logits_workspace_bytes,
)
from tests.gpu.device import CheckedDevice
from tests.gpu.findings import Notebook
from tests.kernels.cuda.moe_cases import (
    Mixture,
    PackedMixture,
    check_gate,
    mixture,
    packed_mixture,
    run_gate,
    run_mixture,
    same_bits,
    truth_and_allowed,
)
from tests.support.kernel_devices import Device

Logits = npt.NDArray[np.float32]
AnyMixture = Mixture | PackedMixture


def check_gates(device: CheckedDevice, book: Notebook, large: bool) -> None:
    """Spread, tied and almost equal logits; numbers of experts on both sides of a lane's and of a warp's."""
    sizes = [(1, 1, 1), (5, 8, 2), (4, 8, 8), (9, 33, 16), (2, 32, 3), (3, 256, 8), (2, 250, 16), (1, 60, 4), (7, 4, 2)]
    sizes += [(2048, 8, 2), (4097, 128, 8)] if large else []
    rng = np.random.default_rng(book.seed)
    for N, E, K in sizes:
        logits = 3 * rng.standard_normal((N, E), dtype=np.float32)
        kinds = {"": logits, " tied": np.round(logits), " equal": np.zeros_like(logits), " close": 60 + 1e-3 * logits}
        for kind, chosen in kinds.items():
            book.check(
                f"gate {K} of {E} for {N} tokens{kind}",
                partial(check_gate, device, chosen.astype(np.float32), K),
            )
    book.check("gate: NaN shows in its token alone", lambda: _gate_nan(device, book.seed))


def _gate_nan(device: Device, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((6, 40), dtype=np.float32)
    alone, _ = run_gate(device, logits, 4)
    logits[2, 31] = np.nan
    weight, expert = run_gate(device, logits, 4)
    assert np.isnan(weight[2]).all()
    assert len(set(expert[2])) == 4
    np.testing.assert_array_equal(np.delete(weight, 2, 0), np.delete(alone, 2, 0))


def check_mixture_twice(device: Device, case: AnyMixture) -> float:
    """Within the budget, and the same bits again. Returns the share of the budget."""
    y = run_mixture(device, case)
    if isinstance(case, PackedMixture):
        truth, allowed = truth_and_allowed(case.wide, rounded_weights=len(y) > FEW_TOKENS)
    else:
        truth, allowed = truth_and_allowed(case)
    off = np.abs(y.astype(np.float64) - truth)
    assert np.isfinite(off).all(), "a result is not finite"
    worst = float((off / allowed).max(initial=0))
    same_bits(run_mixture(device, case), y)
    return worst


def check_mixtures(device: CheckedDevice, book: Notebook, cases: Iterator[tuple[str, AnyMixture]]) -> None:
    for name, case in cases:
        book.check(name, partial(check_mixture_twice, device, case))
    for N, C, I in ((1, 4096, 4096), (12, 2048, 4096)):
        book.check(f"mixture of {N} tokens whose matrices lie beyond 32 bits", partial(_far, device, N, C, I))


def _far(device: Device, N: int, C: int, I: int) -> None:
    """255 experts that are nowhere in memory come before the one that is chosen."""
    case = mixture(N, 1, 1, C, I)
    same_bits(run_mixture(device, case, skipped=255), run_mixture(device, case))


def packed_cases(seed: int, large: bool) -> Iterator[tuple[str, AnyMixture]]:
    """Matrices of 4 and 8 bits, rows that end within a block, both paths."""
    for bits, block, scales, zeros in ((4, 32, "float16", False), (4, 64, "float32", True), (8, 128, "float32", False)):
        stored = PackedMatrices(bits, block, scales, zeros)
        for N, (C, I) in itertools.product((1, 5, FEW_TOKENS + 4), ((64, 128), (72, 40), (136, 8), (8, 264))):
            name = f"mixture of {N} tokens, {C} by {I}, {bits} bits in blocks of {block}"
            yield name, packed_mixture(N, 2, 3, C, I, stored, seed=seed)
        if large:
            for N in (1, 4, 300):
                name = f"mixture of {N} tokens, 512 by 1800, {bits} bits in blocks of {block}"
                yield name, packed_mixture(N, 2, 8, 512, 1800, stored, element="float16", seed=seed)


def mixture_cases(seed: int, large: bool) -> Iterator[tuple[str, AnyMixture]]:
    """Numbers of tokens around both paths and every tile, of experts, sizes off the tiles, types and activations."""
    for element in ("bfloat16", "float16"):
        for N in (1, 2, 3, 4, 5, FEW_TOKENS, FEW_TOKENS + 1, 31, 32, 33):
            yield f"mixture of {N} tokens in {element}", mixture(N, 2, 4, 40, 24, element=element, seed=seed)
    for N, K, E in ((1, 1, 1), (8, 16, 16), (8, 3, 40), (12, 16, 17), (9, 1, 256), (10, 3, 40)):
        yield f"mixture of {N} tokens, {K} of {E} experts", mixture(N, K, E, 16, 8, seed=seed)
    for C, I in ((8, 8), (264, 520), (136, 72), (8, 1600), (1040, 8)):
        for N in (1, 5, 9):
            yield f"mixture of {N} tokens, {C} by {I}", mixture(N, 2, 3, C, I, seed=seed)
    for tokens in (63, 64, 65, 127, 128, 129):
        case = mixture(tokens, 1, 2, 24, 16, seed=seed)
        stacks = {name: np.nan_to_num(getattr(case, name)) for name in ("gate_EIC", "up_EIC", "down_ECI")}
        yield f"one expert for all {tokens}", replace(case, expert_NK=np.ones_like(case.expert_NK), **stacks)
    for activation in ACTIVATIONS:
        for N in (FEW_TOKENS, 20):
            case = mixture(N, 2, 3, 24, 40, activation=activation, element="float16", seed=seed)
            yield f"mixture of {N} tokens with {activation}", case
    for intermediate in (760, 776, 1544, 3080, 6152):
        yield f"mixture split over {intermediate}", mixture(2, 2, 3, 8, intermediate, element="float16", seed=seed)
    if large:
        for N in (1, 4, 8, 9, 200, 600):
            yield f"mixture of {N} tokens, 512 by 1792", mixture(N, 2, 8, 512, 1792, seed=seed)
        yield "mixture of 300 tokens, 6 of 60 experts, 1024 by 704", mixture(300, 6, 60, 1024, 704, seed=seed)


def check_mixture_rules(device: CheckedDevice, book: Notebook) -> None:
    """Weights of zero, experts that do not exist, NaN, and rows that know nothing of each other, on both paths."""
    for N in (FEW_TOKENS, FEW_TOKENS + 4):
        book.check(f"{N} tokens: an expert of weight zero may overflow", partial(_zero_weight, device, N, book.seed))
        book.check(f"{N} tokens: NaN and experts that are none", partial(_not_numbers, device, N, book.seed))
    for tokens in ((8, 1, 2, 3, 5), (150, 9, 40)):
        book.check(f"rows of {tokens[0]} are independent", partial(_independent, device, tokens, book.seed))


def _zero_weight(device: Device, N: int, seed: int) -> None:
    case = mixture(N, 2, 3, 24, 40, activation="relu2", element="float16", seed=seed)
    case.expert_NK[:] = [0, 1]
    case.weight_NK[:, 1] = 0
    for stack in (case.gate_EIC, case.up_EIC, case.down_ECI):
        stack[0] = np.random.default_rng(seed).standard_normal(stack[0].shape) / 4
        stack[1] = 6e4
    check_mixture_twice(device, case)
    case.weight_NK[:] = 0
    assert not run_mixture(device, case).astype(np.float32).any()


def _not_numbers(device: Device, N: int, seed: int) -> None:
    case = mixture(N, 2, 3, 24, 40, seed=seed)
    before = run_mixture(device, case)
    case.x_NC[1, 23] = np.nan
    case.weight_NK[4, 1] = np.nan
    case.expert_NK[6, 0] = 2**40
    after = run_mixture(device, case)
    others = np.delete(np.arange(N), [1, 4, 6])
    assert np.isnan(after[[1, 4, 6]].astype(np.float32)).all()
    same_bits(after[others], before[others])


def _independent(device: Device, tokens: tuple[int, ...], seed: int) -> None:
    case = mixture(tokens[0], 3, 5, 72, 40, seed=seed)
    whole = run_mixture(device, case)
    rng = np.random.default_rng(seed)
    for count in tokens[1:]:
        chosen = rng.permutation(tokens[0])[:count]
        same_bits(run_mixture(device, case.tokens(chosen)), whole[chosen])


def check_top(device: CheckedDevice, book: Notebook, large: bool) -> None:
    """Vocabularies around a block's share and those of real models; ties everywhere, infinities, NaN."""
    sizes = [(1, 1, 1), (3, 64, 64), (2, 4095, 5), (2, 4096, 40), (2, 4097, 64), (1, 8193, 1), (5, 33, 7)]
    sizes += [(1, 32000, 1), (32, 32000, 64), (8, 32768, 50), (4, 131072, 64), (1, 262145, 64)] if large else []
    rng = np.random.default_rng(book.seed)
    for rows, vocabulary, k in sizes:
        logits = 4 * rng.standard_normal((rows, vocabulary), dtype=np.float32)
        infinite = logits.copy()
        infinite[:, ::3] = -np.inf
        infinite[:, -1] = np.inf
        kinds = {"": logits, " tied": np.round(logits), " equal": np.full_like(logits, -1.5), " infinite": infinite}
        for kind, chosen in kinds.items():
            book.check(
                f"top {k} of {vocabulary}, {rows} rows{kind}",
                partial(check_top_logits, device, chosen, k),
            )
        logits[rows // 2, rng.integers(vocabulary)] = np.nan
        book.check(
            f"top {k} of {vocabulary}, {rows} rows with a NaN",
            partial(_top_nan, device, logits, k),
        )


def run_top(device: Device, logits_NV: Logits, k: int) -> tuple[Logits, npt.NDArray[np.int32]]:
    problem = TopProblem(logits_NV.shape[0], logits_NV.shape[1], k)
    logits = device.upload(logits_NV)
    shape = (problem.rows, k)
    values, ids = device.empty(shape, np.float32), device.empty(shape, np.int32)
    workspace = device.empty((top_logits_workspace_bytes(problem, device.launcher.limits),), np.uint8)
    tensors = TopTensors(logits.address, values.address, ids.address, workspace.address)
    launch_top_logits(device.launcher, problem, tensors)
    device.download(workspace)  # looks at its guards
    return device.download(values), device.download(ids)


def check_top_logits(device: Device, logits_NV: Logits, k: int) -> None:
    """Exactly the largest, best first, ties to the lower id."""
    values, ids = run_top(device, logits_NV, k)
    best = np.argsort(-logits_NV, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_array_equal(values, np.take_along_axis(logits_NV, best, axis=1))


def _top_nan(device: Device, logits_NV: Logits, k: int) -> None:
    values, _ = run_top(device, logits_NV, k)
    np.testing.assert_array_equal(np.isnan(values[:, 0]), np.isnan(logits_NV).any(axis=1))
