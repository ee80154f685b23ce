"""Cases of QuantizedMixtureOfExperts, for this process's level of instructions: against numpy in float64.

Numpy rounds activations by the kernel's own rule: a block's scale is its largest magnitude / 127, its numbers are
x * (127 / largest) in float32 to the nearest whole number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.activations import ACTIVATIONS
from tests.support.experts import Case, Routing, Wide, counted, every_case, route, run
from tests.support.kernels import Array, main

OP = "QuantizedMixtureOfExperts"
RELATIVE = 3e-6
"""Of the sum of a number's terms without their signs: room for float32's roundings beside those of the rule."""
NEAR_HALF = 2e-3
"""A gated number so near to the middle of two whole ones may be rounded to either: float32's own error decides."""


@dataclass(frozen=True, slots=True)
class Format:
    bits: int
    block: int
    zeros: bool = False
    scale: type[np.floating] = np.float32


@dataclass(frozen=True, slots=True)
class Matrices:
    """A stack as the file has it, and in float64."""

    packed: Array
    scale: Array
    zero: Array | None
    wide: Wide


def _packed(numbers: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Numbers along the last axis in bytes, the first of two 4-bit ones in the low half."""
    if bits == 8:
        return numbers
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros((*numbers.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(numbers[..., ::2] | numbers[..., 1::2] << 4, np.uint8)


def quantised(
    E: int, rows: int, columns: int, form: Format, chosen: Iterable[int], rng: np.random.Generator
) -> Matrices:
    """A stack of random numbers; experts that are not `chosen` have scales that are no numbers."""
    B = ceil(columns / form.block)
    numbers = rng.integers(0, 1 << form.bits, (E, rows, B, form.block), dtype=np.uint8)
    zeros = rng.integers(0, 1 << form.bits, (E, rows, B), dtype=np.uint8)
    if not form.zeros:
        zeros[:] = 1 << form.bits - 1
    scale = ((rng.random((E, rows, B)) + 0.5) / np.sqrt(columns) / (1 << form.bits - 1)).astype(form.scale)
    wide = scale[..., None].astype(np.float64) * (numbers.astype(np.float64) - zeros[..., None])
    scale[[e for e in range(E) if e not in chosen]] = np.nan
    zero = _packed(zeros, form.bits) if form.zeros else None
    return Matrices(_packed(numbers, form.bits), scale, zero, wide.reshape(E, rows, -1)[..., :columns])


def rounded(x: Array, block: int) -> tuple[Wide, Wide]:
    """A row as the rule rounds it, and the step of each of its numbers where it is near the middle of two, else 0."""
    count = len(x)
    blocks = np.zeros((ceil(count / block), block), np.float32)
    blocks.reshape(-1)[:count] = x
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    step = (largest / np.float32(127)).astype(np.float64)
    scaled = blocks * inverse
    doubtful = np.abs(np.abs(scaled - np.trunc(scaled)) - 0.5) < NEAR_HALF
    values = np.rint(scaled).astype(np.float64) * step
    return values.reshape(-1)[:count], np.where(doubtful, step, 0.0).reshape(-1)[:count]


def quantised_mixture(
    routing: Routing, gate: Matrices, up: Matrices, down: Matrices, activation: str, block: int
) -> tuple[Wide, Wide]:
    """The result in float64, and how far each number may be from it: gated numbers may be rounded the other way."""
    y, room = np.zeros((2, *routing.x_NC.shape))
    for n, row in enumerate(routing.x_NC):
        x, _ = rounded(row, block)
        for weight, e in zip(routing.weight_NK[n].astype(np.float64), routing.expert_NK[n], strict=True):
            if weight == 0:
                continue
            gated = ACTIVATIONS[activation](gate.wide[e] @ x) * (up.wide[e] @ x)
            hidden, steps = rounded(gated.astype(np.float32), block)
            y[n] += weight * (down.wide[e] @ hidden)
            room[n] += weight * (np.abs(down.wide[e]) @ (RELATIVE * np.abs(hidden) + steps))
    return y, room


def matrices_of(gate: Matrices, up: Matrices, down: Matrices) -> dict[str, Array | None]:
    """The node's inputs; zero points only where there are some."""
    stacks = {"gate": gate, "up": up, "down": down}
    inputs: dict[str, Array | None] = {}
    for name, stack in stacks.items():
        inputs |= {name: stack.packed, f"{name}_scale": stack.scale}
    if gate.zero is not None:
        inputs |= {f"{name}_zero": stack.zero for name, stack in stacks.items()}
    return inputs


def check_quantised(case: Case, form: Format) -> None:
    rng = np.random.default_rng([case.seed, case.N, case.C, form.bits])
    routing = route(case, rng)
    gate, up = (quantised(case.E, case.I, case.C, form, routing.chosen, rng) for _ in range(2))
    down = quantised(case.E, case.C, case.I, form, routing.chosen, rng)
    matrices = matrices_of(gate, up, down)
    before = counted(OP)
    attributes: dict[str, int | str] = {"activation": case.activation, "bits": form.bits, "block_size": form.block}
    found = run(OP, routing, matrices, attributes, case.threads)
    parts = [part[0] for part in matrices.values() if part is not None]
    assert counted(OP) - before == len(routing.chosen) * sum(part.nbytes for part in parts)
    truth, room = quantised_mixture(routing, gate, up, down, case.activation, form.block)
    assert found.shape == truth.shape
    over = np.abs(found - truth) - room
    assert over.max(initial=0.0) <= 0, f"by {over.max()} too far off"


def check_an_expert_asked_twice() -> None:
    """One token that names an expert twice, after another expert, gets both shares of it."""
    rng, form = np.random.default_rng(9), Format(4, 32)
    for C in (64, 300):
        for experts in ([1, 3, 3], [3, 3], [3, 1, 3], [0, 2, 1]):
            routing = route(Case(4, len(experts), 1, C, 100), rng)
            routing.expert_NK[:] = experts
            gate, up = (quantised(4, 100, C, form, range(4), rng) for _ in range(2))
            down = quantised(4, C, 100, form, range(4), rng)
            attributes: dict[str, int | float | str] = {"activation": "silu", "bits": 4, "block_size": 32}
            found = run(OP, routing, matrices_of(gate, up, down), attributes)
            truth, room = quantised_mixture(routing, gate, up, down, "silu", 32)
            assert (np.abs(found - truth) <= room).all()


def check_refusals() -> None:
    """Matrices, scales and zero points that do not fit together are refused."""
    rng = np.random.default_rng(4)
    case, form = Case(E=2, K=1, N=3, C=64, I=40), Format(4, 32, zeros=True)
    routing = route(case, rng)
    gate, up = (quantised(2, 40, 64, form, [0, 1], rng) for _ in range(2))
    matrices = matrices_of(gate, up, quantised(2, 64, 40, form, [0, 1], rng))
    attributes: dict[str, int | float | str] = {"activation": "silu", "bits": 4, "block_size": 32}
    for name, array in matrices.items():
        assert array is not None
        for axis in range(array.ndim):
            wrong = matrices | {name: np.ascontiguousarray(np.delete(array, 0, axis))}
            with pytest.raises(Exception, match=r"block|quantised|QuantizedMixtureOfExperts"):
                run(OP, routing, wrong, attributes)
    for bits, block in ((2, 32), (4, 48), (8, 32), (4, 512)):
        with pytest.raises(Exception, match=r"block|bits"):
            run(OP, routing, matrices, attributes | {"bits": bits, "block_size": block})


def cases() -> dict[str, Callable[[], None]]:
    """Name to case, over the formats."""
    every: dict[str, Callable[[], None]] = {"refusals": check_refusals, "twice": check_an_expert_asked_twice}
    formats = [Format(bits, block) for bits in (4, 8) for block in (16, 32, 128, 256)]
    for scale in (np.float32, np.float16):
        formats += [Format(bits, block, True, scale) for bits in (4, 8) for block in (32, 128)]
    for i, case in enumerate(every_case()):
        for form in (formats[i % len(formats)], formats[(i + 5) % len(formats)]):
            every[f"{i}-{form}"] = partial(check_quantised, case, form)
    # More rows than are worked on together.
    every["groups"] = partial(check_quantised, Case(4, 2, 300, 256, 2000, threads=2), Format(4, 32))
    return every


if __name__ == "__main__":
    main(cases())
