"""The activations that CUDA kernels compute, one by one, against float64."""

from __future__ import annotations

import ctypes
from math import erfc
from pathlib import Path

import numpy as np
import pytest

from runtime.kernels.cuda.launch import Kernel
from runtime.kernels.cuda.mixture_problem import ACTIVATIONS
from tests.support.activations import ACTIVATIONS as FUNCTIONS
from tests.support.cuda_cpu import CpuLauncher
from tests.support.kernel_budgets import UNIT_ROUNDOFF, budget_of
from tests.support.kernel_devices import Array, CpuDevice


class _Values(ctypes.Structure):
    _fields_ = [("source", ctypes.c_void_p), ("to", ctypes.c_void_p), ("count", ctypes.c_int)]


def activated(name: str, values: Array) -> Array:
    device = CpuDevice()
    source, to = device.upload(values), device.empty(values.shape, np.float32)
    CpuLauncher(sources=Path(__file__).parent).launch(
        Kernel("activations_probe.cu", "activate", {"GATED_BY": name}),
        grid=(1, 1, 1),
        threads=128,
        shared_bytes=0,
        params=_Values(source.address, to.address, values.size),
    )
    return device.download(to)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_close_to_the_definition(name: str) -> None:
    """Relatively, also where they are small: but below the smallest number that is not flushed to zero."""
    values = np.concatenate([np.linspace(-12, 12, 4001), np.logspace(-6, 1.9, 500), -np.logspace(-6, 1.9, 500), [0]])
    values = values.astype(np.float32)
    wide = values.astype(np.float64)
    cubic = np.sqrt(8 / np.pi) * (wide + 0.044715 * wide**3)
    with np.errstate(over="ignore"):
        if name == "gelu":  # 1 + erf cancels
            truth = wide * np.array([erfc(-x * np.sqrt(0.5)) for x in wide]) / 2
        elif name == "gelu_tanh":  # 1 + tanh does too
            truth = wide / (1 + np.exp(-cubic))
        else:
            truth = FUNCTIONS[name](wide)
    # What exp is given; erfc's is fitted by a polynomial that begins with -1.27.
    exponent = {"gelu": wide**2 / 2 + 1.27, "gelu_tanh": np.abs(cubic)}.get(name, 2 * np.abs(wide))
    allowed = budget_of("activation") * UNIT_ROUNDOFF["float32"] * np.abs(truth) * (1 + exponent)
    assert (np.abs(activated(name, values) - truth) <= allowed + 100 * np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays(name: str) -> None:
    assert np.isnan(activated(name, np.full(3, np.nan, np.float32))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinity_gives_what_the_definition_gives(name: str) -> None:
    found = activated(name, np.array([np.inf, -np.inf], np.float32))
    bounded = {"sigmoid": [1.0, 0.0], "tanh": [1.0, -1.0], "relu": [np.inf, 0.0], "relu2": [np.inf, 0.0]}
    np.testing.assert_array_equal(found, bounded.get(name, [np.inf, np.nan]))
