"""Inputs of the mixtures of experts, as their kernels' tests make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.kernels import counters
from tests.support.activations import ACTIVATIONS
from tests.support.kernels import Array, Node

Wide = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Case:
    """skewed: all tokens go to the same experts; otherwise they choose at random."""

    E: int
    K: int
    N: int
    C: int
    I: int
    activation: str = "silu"
    skewed: bool = False
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Routing:
    x_NC: npt.NDArray[np.float32]
    weight_NK: npt.NDArray[np.float32]
    expert_NK: npt.NDArray[np.int64]

    @property
    def chosen(self) -> list[int]:
        return sorted({int(e) for e in self.expert_NK[self.weight_NK != 0]})


def route(case: Case, rng: np.random.Generator) -> Routing:
    """Inputs of a case; every seventh token's last weight is zero."""
    orders = [rng.permutation(case.E)[: case.K] for _ in range(case.N)]
    if case.skewed:
        orders = [orders[0]] * case.N
    weight_NK = rng.random((case.N, case.K), dtype=np.float32) + np.float32(0.1)
    if case.K > 1:
        weight_NK[3::7, -1] = 0
    expert_NK = np.array(orders, np.int64).reshape(case.N, case.K)
    return Routing(rng.standard_normal((case.N, case.C), dtype=np.float32), weight_NK, expert_NK)


def run(
    op: str,
    routing: Routing,
    matrices: Mapping[str, Array | None],
    attributes: Mapping[str, int | float | str],
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """The op's result on its kernel."""
    inputs: dict[str, Array | None] = {
        "x": routing.x_NC,
        "weight": routing.weight_NK,
        "expert": routing.expert_NK,
        **matrices,
    }
    found = Node(op, inputs, {"y": np.float32}, attributes, threads=threads).run(inputs)["y"]
    return np.asarray(found, np.float32)


def counted(op: str) -> int:
    """Bytes of weights that calls of the op have read so far in this process."""
    return sum(counter.bytes for counter in counters() if counter.op == op)


SIZES = ((1, 1), (7, 13), (16, 48), (33, 100), (64, 96), (130, 50), (257, 70), (32, 300))
CHOICES = ((1, 1), (4, 1), (4, 2), (4, 3), (8, 2), (8, 3))


def every_case() -> Iterator[Case]:
    names = list(ACTIVATIONS)
    number = 0
    for N in (0, 1, 2, 9, 40, 100):
        for E, K in CHOICES:
            C, I = SIZES[number % len(SIZES)]
            yield Case(E, K, N, C, I, names[number % len(names)], threads=1 + number % 2, seed=number)
            number += 3 if number % 2 else 1
    for activation in names:
        yield Case(2, 1, 21, 24, 50, activation)
    for N in (1, 8, 9, 33):
        yield Case(8, 2, N, 48, 64, skewed=True)
