"""Cases of MixtureOfExperts, for this process's level of instructions: against numpy in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from reference.parity import budget, position_errors
from tests.support.activations import ACTIVATIONS
from tests.support.experts import Case, Routing, counted, every_case, route, run
from tests.support.kernels import Array, main

Real = TypeVar("Real", bound=np.floating)
OP = "MixtureOfExperts"
FLOATS: dict[str, npt.DTypeLike] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def mixture(routing: Routing, stacks: list[Array], activation: str, dtype: type[Real]) -> npt.NDArray[Real]:
    """The same function in numpy, in `dtype`; experts that nobody chose are not looked at."""
    y = np.zeros(routing.x_NC.shape, dtype)
    gate, up, down = ({e: stack[e].astype(dtype) for e in routing.chosen} for stack in stacks)
    for n, x in enumerate(routing.x_NC.astype(dtype)):
        for weight, e in zip(routing.weight_NK[n], routing.expert_NK[n], strict=True):
            if weight != 0:
                hidden = ACTIVATIONS[activation](gate[int(e)] @ x) * (up[int(e)] @ x)
                y[n] += weight.astype(dtype) * (down[int(e)] @ hidden)
    return y


def stacks_of(case: Case, chosen: list[int], kind: str, rng: np.random.Generator) -> list[Array]:
    """Gate, up and down; NaN in experts that are not `chosen`, which must not show."""
    stacks = [np.full((case.E, *shape), np.nan, FLOATS[kind]) for shape in [(case.I, case.C)] * 2 + [(case.C, case.I)]]
    for stack in stacks:
        for e in chosen:
            stack[e] = (rng.standard_normal(stack.shape[1:]) / np.sqrt(stack.shape[2])).astype(stack.dtype)
    return stacks


def check_stored(case: Case, kind: str) -> None:
    rng = np.random.default_rng([case.seed, case.N, case.C])
    routing = route(case, rng)
    stacks = stacks_of(case, routing.chosen, kind, rng)
    matrices: dict[str, Array | None] = dict(zip(("gate", "up", "down"), stacks, strict=True))
    before = counted(OP)
    found = run(OP, routing, matrices, {"activation": case.activation}, case.threads)
    bytes_read = len(routing.chosen) * sum(stack[0].nbytes for stack in stacks)
    assert counted(OP) - before == bytes_read
    truth = mixture(routing, stacks, case.activation, np.float64)
    assert found.shape == truth.shape
    if found.size == 0:
        return
    plain = mixture(routing, stacks, case.activation, np.float32)
    assert position_errors(truth, found).max() <= budget([truth], [plain], "float32").allowed


def check_overflow(kind: str) -> None:
    """An expert of weight 0 that would overflow adds nothing, for few tokens and for many."""
    for N in (1, 3, 30):
        case = Case(E=3, K=2, N=N, C=20, I=30)
        rng = np.random.default_rng(5)
        routing = route(case, rng)
        routing.expert_NK[:] = [0, 1]
        routing.weight_NK[:, 1] = 0
        stacks = stacks_of(case, [0, 1], kind, rng)
        for stack in stacks:
            stack[1] = 6e4
        matrices: dict[str, Array | None] = dict(zip(("gate", "up", "down"), stacks, strict=True))
        found = run(OP, routing, matrices, {"activation": "relu2"}, 1)
        truth = mixture(routing, stacks, "relu2", np.float64)
        plain = mixture(routing, stacks, "relu2", np.float32)
        assert position_errors(truth, found).max() <= budget([truth], [plain], "float32").allowed


def check_threads() -> None:
    """Two threads give the same bits as one, for few tokens and for many."""
    for N in (1, 5, 300):
        for kind in FLOATS:
            case, rng = Case(E=4, K=2, N=N, C=200, I=150), np.random.default_rng(9)
            routing = route(case, rng)
            stacks = stacks_of(case, routing.chosen, kind, rng)
            matrices: dict[str, Array | None] = dict(zip(("gate", "up", "down"), stacks, strict=True))
            one, two = (run(OP, routing, matrices, {"activation": "silu"}, t) for t in (1, 2))
            np.testing.assert_array_equal(one, two)


def check_refusals() -> None:
    """Experts that do not exist and matrices that do not fit together are refused by name."""
    case, rng = Case(E=3, K=2, N=2, C=4, I=5), np.random.default_rng(9)
    routing = route(case, rng)
    gate, up, down = stacks_of(case, [0, 1, 2], "float32", rng)
    for number in (3, -1, 2**40):
        wrong = replace(routing, expert_NK=np.array([[0, 1], [number, 0]], np.int64))
        _refused("an expert that does not exist", wrong, {"gate": gate, "up": up, "down": down})
    _refused("[E, I, C]", routing, {"gate": gate, "up": up, "down": down[:2]})
    _refused("[E, I, C]", routing, {"gate": gate, "up": up[:, :4], "down": down})
    _refused(
        "weights [N, K]", replace(routing, weight_NK=routing.weight_NK[:1]), {"gate": gate, "up": up, "down": down}
    )


def _refused(words: str, routing: Routing, matrices: dict[str, Array | None]) -> None:
    with pytest.raises(Exception, match=re.escape(words)):
        run(OP, routing, matrices, {"activation": "silu"})


def cases() -> dict[str, Callable[[], None]]:
    """Name to case, for each type of stored weight."""
    every: dict[str, Callable[[], None]] = {"threads": check_threads, "refusals": check_refusals}
    for kind in FLOATS:
        for i, case in enumerate(every_case()):
            every[f"stored-{i}-{kind}"] = partial(check_stored, case, kind)
        every[f"overflow-{kind}"] = partial(check_overflow, kind)
    # More tokens of one expert than one product of panels has; more rows than are worked on together.
    every["many"] = partial(check_stored, Case(2, 1, 600, 20, 60, skewed=True, threads=2), "float32")
    every["groups"] = partial(check_stored, Case(6, 3, 400, 500, 1500, threads=2), "bfloat16")
    return every


if __name__ == "__main__":
    main(cases())
