"""Cases of RMSNorm, for this process's level of instructions: against float64 and beside its function body."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from graph_passes.ops.rms_norm import RMS_NORM
from reference.parity import budget, position_errors
from tests.support.kernels import Node, main

Floats = npt.NDArray[np.float32]
SHAPES = (
    (1, 1), (3, 5), (2, 15), (2, 16), (4, 17), (1, 7, 33), (2, 3, 4, 64), (9,), (5, 4097),
    (300, 100), (70, 1000), (3, 20000),  # more than one thread takes at once, in many rows and in single ones
    (0, 8), (2, 0, 8), (3, 0),
)  # fmt: skip


def normed(x: Floats, weight_C: Floats, epsilon: float, *, native: bool = True, threads: int = 1) -> Floats:
    inputs, attributes = {"x": x, "weight": weight_C}, {"epsilon": epsilon}
    functions = () if native else [ir.to_proto(f) for f in RMS_NORM.functions(attributes)]
    node = Node("RMSNorm", inputs, {"y": np.float32}, attributes, native=native, functions=functions, threads=threads)
    return np.asarray(node.run(inputs)["y"], np.float32)


def check(shape: tuple[int, ...], size: float, epsilon: float) -> None:
    rng = np.random.default_rng(shape)
    x = np.float32(size) * rng.standard_normal(shape, dtype=np.float32)
    weight_C = 3 * rng.standard_normal(shape[-1], dtype=np.float32)
    found = normed(x, weight_C, epsilon, threads=1 + len(shape) % 2)
    assert found.shape == shape
    if found.size == 0:
        return
    wide = x.astype(np.float64).reshape(-1, shape[-1])
    truth = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + np.float32(epsilon)) * weight_C
    plain = normed(x, weight_C, epsilon, native=False)
    allowed = budget([truth], [plain.reshape(truth.shape)], "float32").allowed
    assert position_errors(truth, found.reshape(truth.shape)).max() <= allowed


def check_extremes(width: int) -> None:
    """Zeros, what overflows when squared and what is not finite come out as the body has it, each in its own row."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((8, width), dtype=np.float32)
    x[1] = 0
    x[2, width // 2], x[3, -1], x[4, 0], x[5, -1] = np.nan, np.inf, -np.inf, 1e30
    x[6] *= np.float32(1e-25)
    weight_C = rng.standard_normal(width, dtype=np.float32)
    weight_C[width // 3] = 0
    found, body = (normed(x, weight_C, 1e-5, native=native) for native in (True, False))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(body))
    assert np.isnan(found[2]).all()
    assert np.isnan(found[3]).any()
    assert np.isnan(found[4]).any()
    there = np.isfinite(body)
    np.testing.assert_array_equal(there, np.isfinite(found))
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_array_equal(np.where(there, found, 0)[5], 0)
    rows = [0, 6, 7]
    truth = x[rows].astype(np.float64)
    truth = truth / np.sqrt((truth**2).mean(axis=-1, keepdims=True) + np.float32(1e-5)) * weight_C
    for row, expected in zip(rows, truth, strict=True):
        allowed = budget([expected[None]], [body[None, row]], "float32").allowed
        assert position_errors(expected[None], found[None, row]).max() <= allowed


def check_rows_are_their_own() -> None:
    """A row's result has the same bits alone, among others, and on two threads."""
    rng = np.random.default_rng(3)
    x, weight_C = rng.standard_normal((500, 70), dtype=np.float32), rng.standard_normal(70, dtype=np.float32)
    found = normed(x, weight_C, 1e-6)
    np.testing.assert_array_equal(normed(x, weight_C, 1e-6, threads=2), found)
    np.testing.assert_array_equal(normed(x[123:124], weight_C, 1e-6), found[123:124])


def check_refusals() -> None:
    x = np.ones((2, 3), np.float32)
    for weight in (np.ones(2, np.float32), np.ones(4, np.float32), np.ones((1, 3), np.float32)):
        with pytest.raises(Exception, match="one weight of that width"):
            normed(x, weight, 1e-5)
    inputs = {"x": x, "weight": np.ones(3, np.float32)}
    with pytest.raises(Exception, match="no attribute epsilon"):
        Node("RMSNorm", inputs, {"y": np.float32}, {})


def cases() -> dict[str, Callable[[], None]]:
    """Name to case."""
    every: dict[str, Callable[[], None]] = {"refusals": check_refusals, "rows": check_rows_are_their_own}
    for i, shape in enumerate(SHAPES):
        for size, epsilon in ((1.0, 1e-5), (1e3, 1e-6), (3e-4, 1e-5), (1.0, 0.0)):
            every[f"{i}-{size}-{epsilon}"] = partial(check, shape, size, epsilon)
    for width in (1, 7, 16, 40):
        every[f"extremes-{width}"] = partial(check_extremes, width)
    return every


if __name__ == "__main__":
    main(cases())
