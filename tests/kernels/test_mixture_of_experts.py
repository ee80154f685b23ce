"""The kernels of MixtureOfExperts and QuantizedMixtureOfExperts at every level of instructions."""

from __future__ import annotations

import pytest

from tests.support.kernels import levels, run_cases


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("module", ["mixture_of_experts_cases", "quantized_mixture_of_experts_cases"])
def test_all_cases(module: str, level: str) -> None:
    assert run_cases(module, level).startswith(level)
