"""Activations: the names that a config may hold, each the function that transformers has under that name."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from reference.activations import ACTIVATIONS
from reference.config import SUPPORTED_ACTIVATIONS

NAMES = sorted(SUPPORTED_ACTIVATIONS)


def test_there_is_a_function_for_every_name_that_a_config_may_hold() -> None:
    assert set(ACTIVATIONS) == SUPPORTED_ACTIVATIONS


@pytest.mark.parametrize("dtype,eps", [(torch.float64, 2.0**-52), (torch.float32, 2.0**-23)])
@pytest.mark.parametrize("name", NAMES)
def test_each_is_its_namesake_in_transformers(name: str, dtype: torch.dtype, eps: float) -> None:
    x = torch.cat([torch.linspace(-20, 20, 4001, dtype=torch.float64), torch.tensor([-1e4, -1e-30, 0.0, 1e4])])
    ours, theirs = ACTIVATIONS[name](x.to(dtype)), ACT2FN[name](x.to(dtype))
    assert ours.dtype == dtype
    # A few roundings of the largest intermediate: gelu subtracts nearly equal numbers for negative x.
    assert bool(((ours - theirs).abs() <= 8 * eps * theirs.abs().maximum(x.abs())).all())


def test_names_for_one_function_and_functions_that_differ() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    values = {name: function(x) for name, function in ACTIVATIONS.items()}
    same = {frozenset({"silu", "swish"}), frozenset({"gelu_new", "gelu_pytorch_tanh"})}
    for one in NAMES:
        for other in NAMES:
            equal = one == other or frozenset({one, other}) in same
            assert (float((values[one] - values[other]).abs().max()) == 0) == equal, (one, other)
