"""TensorRT-RTX for tests: it builds engines without a GPU, wherever there are wheels of it."""

from __future__ import annotations

import platform

import pytest

from runtime.tensorrt.flavor import Flavor, load_flavor


def tensorrt_rtx() -> Flavor:
    """The library. Skips the tests of a module on machines that it is not made for."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("TensorRT-RTX is there for Linux on x86-64 alone (in this form)", allow_module_level=True)
    return load_flavor("tensorrt-rtx")
