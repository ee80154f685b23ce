"""Cases of MixtureOfExperts and QuantizedMixtureOfExperts, for this process's level of instructions.

Truth is numpy in float64. For quantised experts it rounds activations by the kernel's own rule: a block's scale is its
largest magnitude / 127, its numbers are x * (127 / largest) in float32 to the nearest whole number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, erf

import ml_dtypes
import numpy as np
import numpy.typing as npt

from reference.parity import budget, position_errors
from runtime.kernels import counters
from tests.support.kernels import Array, Node, main

Wide = npt.NDArray[np.float64]
FLOATS: dict[str, npt.DTypeLike] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ACTIVATIONS: dict[str, Callable[[Wide], Wide]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(erf, otypes=[x.dtype])(x * np.sqrt(0.5))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
RELATIVE = 3e-6
"""Of the sum of a number's terms without their signs: room for float32's roundings beside those of the rule."""
NEAR_HALF = 2e-3
"""A gated number so near to the middle of two whole ones may be rounded to either: float32's own error decides."""


@dataclass(frozen=True, slots=True)
class Case:
    """skewed: all tokens go to the same experts; otherwise they choose at random."""

    E: int
    K: int
    N: int
    C: int
    I: int  # noqa: E741 - the field's letter for the intermediate size
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


def run(op: str, routing: Routing, matrices: dict[str, Array | None], attributes: dict[str, int | str], threads: int) -> Array:
    inputs: dict[str, Array | None] = {
        "x": routing.x_NC,
        "weight": routing.weight_NK,
        "expert": routing.expert_NK,
        **matrices,
    }
    return Node(op, inputs, {"y": np.float32}, attributes, threads=threads).run(inputs)["y"]


def counted(op: str) -> int:
    return sum(counter.bytes for counter in counters() if counter.op == op)


# -- experts as they are stored --


def mixture(routing: Routing, stacks: list[Array], activation: str, dtype: npt.DTypeLike) -> Array:
    """The same function in numpy, in `dtype`; experts that nobody chose are not looked at."""
    y = np.zeros(routing.x_NC.shape, dtype)
    gate, up, down = ({e: stack[e].astype(dtype) for e in routing.chosen} for stack in stacks)
    for n, x in enumerate(routing.x_NC.astype(dtype)):
        for weight, e in zip(routing.weight_NK[n], routing.expert_NK[n], strict=True):
            if weight != 0:
                hidden = ACTIVATIONS[activation]((gate[int(e)] @ x)) * (up[int(e)] @ x)
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
    before = counted("MixtureOfExperts")
    found = run("MixtureOfExperts", routing, matrices, {"activation": case.activation}, case.threads)
    bytes_read = len(routing.chosen) * sum(stack[0].nbytes for stack in stacks)
    assert counted("MixtureOfExperts") - before == bytes_read
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
        found = run("MixtureOfExperts", routing, matrices, {"activation": "relu2"}, 1)
        truth = mixture(routing, stacks, "relu2", np.float64)
        plain = mixture(routing, stacks, "relu2", np.float32)
        assert position_errors(truth, found).max() <= budget([truth], [plain], "float32").allowed


# -- quantised experts --


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


def quantised(E: int, rows: int, columns: int, form: Format, chosen: list[int], rng: np.random.Generator) -> Matrices:
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


def check_quantised(case: Case, form: Format) -> None:
    rng = np.random.default_rng([case.seed, case.N, case.C, form.bits])
    routing = route(case, rng)
    gate, up = (quantised(case.E, case.I, case.C, form, routing.chosen, rng) for _ in range(2))
    down = quantised(case.E, case.C, case.I, form, routing.chosen, rng)
    matrices: dict[str, Array | None] = {}
    for name, stack in (("gate", gate), ("up", up), ("down", down)):
        matrices |= {name: stack.packed, f"{name}_scale": stack.scale}
    if form.zeros:
        matrices |= {"gate_zero": gate.zero, "up_zero": up.zero, "down_zero": down.zero}
    op = "QuantizedMixtureOfExperts"
    before = counted(op)
    attributes: dict[str, int | str] = {"activation": case.activation, "bits": form.bits, "block_size": form.block}
    found = run(op, routing, matrices, attributes, case.threads)
    parts = [part[0] for name, part in matrices.items() if part is not None]
    assert counted(op) - before == len(routing.chosen) * sum(part.nbytes for part in parts)
    truth, room = quantised_mixture(routing, gate, up, down, case.activation, form.block)
    assert found.shape == truth.shape
    over = np.abs(found - truth) - room
    assert over.max(initial=0.0) <= 0, f"by {over.max()} too far off"


# -- both --


def check_threads() -> None:
    """Two threads give the same bits as one, for few tokens and for many."""
    for N in (1, 5, 300):
        for kind in FLOATS:
            case, rng = Case(E=4, K=2, N=N, C=200, I=150), np.random.default_rng(9)
            routing = route(case, rng)
            stacks = stacks_of(case, routing.chosen, kind, rng)
            matrices: dict[str, Array | None] = dict(zip(("gate", "up", "down"), stacks, strict=True))
            one, two = (run("MixtureOfExperts", routing, matrices, {"activation": "silu"}, t) for t in (1, 2))
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
    _refused("weights [N, K]", replace(routing, weight_NK=routing.weight_NK[:1]), {"gate": gate, "up": up, "down": down})


def _refused(words: str, routing: Routing, matrices: dict[str, Array | None]) -> None:
    try:
        run("MixtureOfExperts", routing, matrices, {"activation": "silu"}, 1)
    except Exception as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"a mixture of experts ran that should be refused for {words!r}")


SIZES = ((1, 1), (7, 13), (16, 48), (33, 100), (64, 96), (130, 50), (257, 70), (32, 300))
CHOICES = ((1, 1), (4, 1), (4, 2), (4, 3), (8, 2), (8, 3))


def _cases() -> Iterator[Case]:
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


def cases() -> dict[str, Callable[[], None]]:
    """Name to case: every type of stored weight, every format of quantised ones."""
    every: dict[str, Callable[[], None]] = {"threads": check_threads, "refusals": check_refusals}
    formats = [Format(bits, block) for bits in (4, 8) for block in (16, 32, 128, 256)]
    formats += [Format(bits, block, True, scale) for bits in (4, 8) for block in (32, 128) for scale in (np.float32, np.float16)]
    for i, case in enumerate(_cases()):
        for kind in FLOATS:
            every[f"stored-{i}-{kind}"] = partial(check_stored, case, kind)
        for form in (formats[i % len(formats)], formats[(i + 5) % len(formats)]):
            every[f"quantised-{i}-{form}"] = partial(check_quantised, case, form)
    for kind in FLOATS:
        every[f"overflow-{kind}"] = partial(check_overflow, kind)
    # More tokens of one expert than one product of panels has; more rows than are worked on together.
    every["many"] = partial(check_stored, Case(2, 1, 600, 20, 60, skewed=True, threads=2), "float32")
    every["groups"] = partial(check_stored, Case(6, 3, 400, 500, 1500, threads=2), "bfloat16")
    every["quantised-groups"] = partial(check_quantised, Case(4, 2, 300, 256, 2000, threads=2), Format(4, 32))
    return every


if __name__ == "__main__":
    main(cases())
