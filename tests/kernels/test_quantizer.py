"""The native quantiser at every level of instructions gives the bits of the one in torch."""

from __future__ import annotations

import pytest

from tests.support.kernels import levels, run_cases


@pytest.mark.parametrize("level", levels())
def test_all_cases(level: str) -> None:
    assert run_cases("quantizer_cases", level).startswith(level)
