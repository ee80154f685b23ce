"""RMSNorm's kernel at every level of instructions."""

from __future__ import annotations

import pytest

from tests.support.kernels import levels, run_cases


@pytest.mark.parametrize("level", levels())
def test_all_cases(level: str) -> None:
    assert run_cases("rms_norm_cases", level).startswith(level)
