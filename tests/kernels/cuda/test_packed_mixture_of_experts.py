"""QuantizedMixtureOfExperts' CUDA kernels, on the CPU: matrices of 4-bit and 8-bit numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits
from runtime.kernels.cuda.mixture_of_experts import FEW_TOKENS, PackedMatrices
from tests.kernels.cuda.moe_cases import check_mixture, packed_mixture, run_mixture, same_bits
from tests.support.kernel_devices import CpuDevice

STORED = {
    "int4": PackedMatrices(4, 32, "float16", False),
    "int4-zero": PackedMatrices(4, 64, "float32", True),
    "int8": PackedMatrices(8, 128, "float32", False),
    "int8-zero": PackedMatrices(8, 32, "float16", True),
}


@pytest.mark.parametrize(
    ("stored", "N"), [*((stored, N) for stored in STORED for N in (1, FEW_TOKENS + 4)), ("int4", 5), ("int8-zero", 7)]
)
def test_storage(stored: str, N: int) -> None:
    """Whole blocks, and rows that end within one."""
    for C, I in ((64, 128), (72, 40), (136, 8), (8, 264)):
        check_mixture(CpuDevice(), packed_mixture(N, 2, 3, C, I, STORED[stored]))


def test_float16() -> None:
    check_mixture(CpuDevice(), packed_mixture(40, 2, 3, 72, 264, STORED["int4-zero"], element="float16"))


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_blocks(block: int) -> None:
    for N in (1, 9):
        check_mixture(CpuDevice(), packed_mixture(N, 1, 2, 520, 24, replace(STORED["int4-zero"], block=block)))


@pytest.mark.parametrize("I", [6136, 6152])
def test_split_rows_of_down(I: int) -> None:
    check_mixture(CpuDevice(), packed_mixture(1, 2, 3, 8, I, STORED["int4"]))


def test_matrices_beyond_32_bits() -> None:
    case = packed_mixture(1, 1, 1, 4096, 4136, STORED["int4-zero"])
    same_bits(run_mixture(CpuDevice(), case, skipped=255), run_mixture(CpuDevice(), case))


@pytest.mark.parametrize("tokens", [(8, 1, 3), (150, 9, 40)])
@pytest.mark.parametrize("stored", ["int4", "int8-zero"])
def test_rows_are_independent(stored: str, tokens: tuple[int, ...]) -> None:
    case = packed_mixture(tokens[0], 3, 5, 72, 40, STORED[stored])
    whole = check_mixture(CpuDevice(), case)
    for count in tokens[1:]:
        chosen = np.random.default_rng(3).permutation(tokens[0])[:count]
        same_bits(run_mixture(CpuDevice(seed=count), case.tokens(chosen)), whole[chosen])


def test_other_devices_give_the_same_bits() -> None:
    case = packed_mixture(140, 2, 3, 136, 40, STORED["int4"])
    other = CpuDevice(DeviceLimits(4, 50 << 10, (8, 0)))
    same_bits(run_mixture(other, case), run_mixture(CpuDevice(), case))


@pytest.mark.parametrize("N", [5, FEW_TOKENS + 4])
def test_nan_shows_in_its_token_alone(N: int) -> None:
    case = packed_mixture(N, 2, 3, 72, 40, STORED["int4"])
    before = run_mixture(CpuDevice(), case)
    case.wide.x_NC[1, 71] = np.nan
    case.wide.x_NC[4, 0] = np.inf
    after = run_mixture(CpuDevice(), case)
    assert np.isnan(after[[1, 4]].astype(np.float32)).all()
    same_bits(np.delete(after, [1, 4], axis=0), np.delete(before, [1, 4], axis=0))


@pytest.mark.parametrize("changes", [{"bits": 3}, {"bits": 16}, {"block": 16}, {"block": 48}, {"scales": "bfloat16"}])
def test_refused(changes: dict[str, int]) -> None:
    with pytest.raises(BackendError, match="4 or 8 bits"):
        replace(STORED["int4"], **changes)  # type: ignore[arg-type]
