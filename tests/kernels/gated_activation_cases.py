"""Cases of GatedActivation, for this process's level of instructions: against float64 and beside its function body."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from graph_passes.ops.gated_activation import GATED_ACTIVATION
from reference.parity import budget, position_errors
from tests.support.activations import ACTIVATIONS
from tests.support.kernels import Node, main

Floats = npt.NDArray[np.float32]
SHAPES = ((1,), (5,), (3, 7), (2, 1, 16), (1, 3, 33), (2, 2, 2, 17), (4, 5000), (0,), (3, 0))  # 8192 go to one thread


@cache
def node(activation: str, rank: int, native: bool, threads: int) -> Node:
    some, attributes = np.ones((1,) * rank, np.float32), {"activation": activation}
    functions = () if native else [ir.to_proto(f) for f in GATED_ACTIVATION.functions(attributes)]
    return Node(
        "GatedActivation",
        {"gate": some, "up": some},
        {"y": np.float32},
        attributes,
        native=native,
        functions=functions,
        threads=threads,
    )


def gated(gate: Floats, up: Floats, activation: str, *, native: bool = True, threads: int = 1) -> Floats:
    found = node(activation, gate.ndim, native, threads).run({"gate": gate, "up": up})["y"]
    return np.asarray(found, np.float32)


def check(activation: str, shape: tuple[int, ...], size: float) -> None:
    rng = np.random.default_rng([*shape, len(activation)])
    gate, up = np.float32(size) * rng.standard_normal((2, *shape), dtype=np.float32)
    found = gated(gate, up, activation, threads=1 + len(shape) % 2)
    assert found.shape == shape
    if found.size == 0:
        return
    with np.errstate(over="ignore"):
        truth = ACTIVATIONS[activation](gate.astype(np.float64)) * up.astype(np.float64)
    plain = gated(gate, up, activation, native=False)
    allowed = budget([truth[None]], [plain[None]], "float32").allowed
    assert position_errors(truth[None], found[None]).max() <= allowed


def check_extremes(activation: str) -> None:
    """Saturated and not finite ones: not finite exactly where float64 is not, else near it; in vectors and in the rest.

    ONNX Runtime's own Sigmoid is 0.1 % off at -11 and zero from -18 on, so that the body cannot be the measure here.
    """
    sizes = [0.0, 1e-30, 0.5, 11.0, 80.0, 87.0, 88.0, 88.5, 88.7, 88.8, 89.0, 90.0, 103.0, 105.0, 1e10, 3e38]
    numbers = np.array([sign * x for x in (*sizes, np.inf, np.nan) for sign in (1, -1)], np.float32)
    for scale in (1.0, -2.0, 0.0, 3e38, np.inf, np.nan):
        up = np.full_like(numbers, scale)
        with np.errstate(all="ignore"):
            active = ACTIVATIONS[activation](numbers.astype(np.float64)).astype(np.float32)  # squares overflow there
            truth = (active.astype(np.float64) * up).astype(np.float32)
        alone = [gated(numbers[i : i + 1], up[i : i + 1], activation) for i in range(len(numbers))]
        for found in (gated(numbers, up, activation), np.concatenate(alone)):
            np.testing.assert_array_equal(np.isfinite(found), np.isfinite(truth))
            there = np.isfinite(truth)
            moderate = there & (np.abs(truth) < 1e12)
            body = gated(numbers, up, activation, native=False)
            for some in (moderate, there):  # large results have a budget that hides the others
                if some.any():
                    allowed = budget([truth[None, some]], [body[None, some]], "float32").allowed
                    assert position_errors(truth[None, some], found[None, some]).max() <= allowed


def check_refusals() -> None:
    x = np.ones((2, 3), np.float32)
    for up in (np.ones((3, 2), np.float32), np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)):
        with pytest.raises(Exception, match="two tensors of one shape"):
            gated(x, up, "silu")
    with pytest.raises(Exception, match="no activation that its kernel knows"):
        gated(x, x, "swish")


def cases() -> dict[str, Callable[[], None]]:
    """Name to case."""
    every: dict[str, Callable[[], None]] = {"refusals": check_refusals}
    for activation in ACTIVATIONS:
        for i, shape in enumerate(SHAPES):
            every[f"{activation}-{i}"] = partial(check, activation, shape, (1.0, 0.01, 8.0)[i % 3])
        every[f"{activation}-extremes"] = partial(check_extremes, activation)
    return every


if __name__ == "__main__":
    main(cases())
