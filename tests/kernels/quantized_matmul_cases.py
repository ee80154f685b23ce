"""Cases of QuantizedMatMul, for this process's level of instructions.

Truth is numpy in float64 over activations that were rounded by the kernel's rule, so that only the order of float32
sums is left to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tests.support.kernels import Array, Node, main

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
BLOCKS = (16, 32, 64, 128, 256)
WIDTHS = (1, 5, 16, 31, 32, 33, 96, 127, 128, 129, 300)
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, 64, 100)
CLOSE = 1e-6
"""Of ‖x‖·‖w‖: about eight roundings in float32; a value that is off by one whole number is a thousand times further."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantised matrix. dense_NK: what it stands for."""

    inputs: dict[str, Array | None]
    attributes: dict[str, int]
    dense_NK: Wide

    @property
    def block(self) -> int:
        return self.attributes["block_size"]


def packed(numbers: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Numbers in the last axis, two to a byte where they have 4 bits, the first in the low half."""
    if bits == 8:
        return numbers
    even = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, numbers.shape[-1] % 2)])
    return np.asarray(even[..., 0::2] | even[..., 1::2] << 4, np.uint8)


def matrix(N: int, K: int, bits: int, block: int, zeros: bool, scale: npt.DTypeLike, seed: int = 0) -> Matrix:
    """Random numbers, the rest of the last block included; every fourth block has a negative scale or none."""
    rng = np.random.default_rng([seed, N, K, bits, block])
    B = -(-K // block)
    numbers = rng.integers(0, 1 << bits, (N, B, block), dtype=np.uint8)
    scale_NB = (rng.uniform(0.01, 0.02, (N, B)) * rng.choice([1, 1, 1, 1, 1, 1, -1, 0], (N, B))).astype(scale)
    zero_NB = rng.integers(0, 1 << bits, (N, B), dtype=np.uint8) if zeros else np.full((N, B), 1 << bits - 1, np.uint8)
    dense = (numbers.astype(np.float64) - zero_NB[..., None]) * scale_NB[..., None].astype(np.float64)
    inputs: dict[str, Array | None] = {
        "packed": packed(numbers, bits),
        "scale": scale_NB,
        "zero": packed(zero_NB, bits) if zeros else None,
    }
    attributes = {"K": K, "N": N, "bits": bits, "block_size": block}
    return Matrix(inputs, attributes, dense.reshape(N, B * block)[:, :K])


def rounded(x: Floats, block: int) -> Wide:
    """Activations [M, K] after rounding in blocks: the rule of runtime/kernels/cpu/quantized_matmul.h."""
    M, K = x.shape
    blocks = -(-K // block)
    whole = np.pad(x, [(0, 0), (0, -K % block)]).reshape(M, blocks, block)
    largest = np.abs(whole).max(-1)
    scale = np.where(largest < np.float32(2.0**-119), np.float32(0), largest / np.float32(127))
    inverse = np.float32(127) / np.where(scale == 0, np.float32(np.inf), largest)
    numbers = np.rint(whole * inverse[..., None])
    return np.asarray((numbers * scale[..., None].astype(np.float64)).reshape(M, blocks * block)[:, :K])


def node_of(weight: Matrix, rank: int = 2, threads: int = 1) -> Node:
    x = np.zeros((1,) * rank, np.float32)
    return Node("QuantizedMatMul", {"x": x, **weight.inputs}, {"y": np.float32}, weight.attributes, threads=threads)


def product(node: Node, weight: Matrix, x: Floats) -> Floats:
    return np.asarray(node.run({"x": x, **weight.inputs})["y"], np.float32)


def hold(y: Floats, x: Floats, weight: Matrix) -> None:
    """Every number of y [M, N] close to the truth for x [M, K]."""
    assert y.shape == (len(x), len(weight.dense_NK))
    lengths = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(weight.dense_NK, axis=1)
    error = np.abs(y - rounded(x, weight.block) @ weight.dense_NK.T)
    worst = np.max(error / np.maximum(lengths, 1e-300), initial=0.0)
    assert worst <= CLOSE, f"{weight.attributes}, {len(x)} rows: off by {worst:.2e} of the lengths"


def activations(M: int, K: int, seed: int = 1) -> Floats:
    """Rows whose blocks differ in size, with an offset, so that sums of activations are large."""
    rng = np.random.default_rng([seed, M, K])
    x = (rng.standard_normal((M, K)) + rng.uniform(-2, 2, (M, 1))) * 2.0 ** rng.integers(-8, 8, (1, K))
    return x.astype(np.float32)


def check(bits: int, block: int, zeros: bool) -> None:
    """All widths, and all numbers of columns and of rows with some of them."""
    sizes = [(17, K) for K in WIDTHS] + [(N, K) for N in (1, 3, 16, 50) for K in (33, 129)]
    for index, (N, K) in enumerate(sizes):
        weight = matrix(N, K, bits, block, zeros, ("float16", "float32")[index % 2])
        node = node_of(weight)
        for M in ROWS:
            x = activations(M, K)
            hold(product(node, weight, x), x, weight)


def many_rows() -> None:
    """More columns than one piece, more of K than one step down, more rows than one block of them."""
    for bits, zeros, N, K, M in ((4, True, 197, 2348, 300), (8, True, 101, 4200, 271), (4, False, 70, 6200, 20)):
        for block in (16, 32, 256):
            weight = matrix(N, K, bits, block, zeros, "float16")
            x = activations(M, K)
            hold(product(node_of(weight, threads=2), weight, x), x, weight)


def ranks() -> None:
    weight = matrix(17, 33, 4, 16, True, "float16")
    for shape in ((33,), (5, 33), (2, 3, 33), (2, 2, 5, 33), (2, 0, 33)):
        x = activations(int(np.prod(shape[:-1])), 33)
        y = product(node_of(weight, rank=len(shape)), weight, x.reshape(shape))
        assert y.shape == (*shape[:-1], 17)
        hold(y.reshape(-1, 17), x, weight)


def magnitudes() -> None:
    """Zero rows and blocks, huge and tiny numbers, and blocks that are too small to have a scale."""
    for bits in (4, 8):
        weight = matrix(17, 300, bits, 32, True, "float32")
        node = node_of(weight)
        for M in (1, 7, 20):
            x = activations(M, 300)
            x[0, 32:96] = 0
            x[M // 2] = 0
            hold(product(node, weight, x), x, weight)
            assert not product(node, weight, x)[M // 2].any()
            for size in (2.0**100, 2.0**-90):
                hold(product(node, weight, x * np.float32(size)), x * np.float32(size), weight)
            small = np.full((M, 300), 2.0**-121, np.float32)
            assert not product(node, weight, small).any()


def halves_to_even() -> None:
    """Numbers that lie in the middle between two values."""
    weight = matrix(3, 32, 8, 32, False, "float32")
    x = np.zeros((9, 32), np.float32)
    x[:, 0], x[:, 1:] = 127, np.arange(31) - 15.5
    for M in (1, 9):
        hold(product(node_of(weight), weight, x[:M]), x[:M], weight)
        assert (rounded(x, 32)[0, 1:5] == [-16, -14, -14, -12]).all()


def not_finite() -> None:
    """A NaN or an infinity shows in its own row and in no other."""
    for bits in (4, 8):
        weight = matrix(17, 96, bits, 32, False, "float32")
        weight.inputs["scale"] = np.abs(np.asarray(weight.inputs["scale"])) + np.float32(1)
        node = node_of(weight)
        for M in (2, 9):
            for value in (np.nan, -np.nan, np.inf, -np.inf):
                x = activations(M, 96)
                clean = product(node, weight, x)
                x[1, 40] = value
                y = product(node, weight, x)
                assert not np.isfinite(y[1]).any()
                np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(clean, 1, 0))


def each_row_alone() -> None:
    """A row's product does not depend on the rows beside it, but for the order of its float32 sums."""
    for bits, block in ((4, 32), (8, 128)):
        weight = matrix(50, 300, bits, block, True, "float16")
        node = node_of(weight)
        for M in (3, 8, 9, 40):
            x = activations(M, 300)
            together = product(node, weight, x)
            alone = np.concatenate([product(node, weight, row[None]) for row in x])
            lengths = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(weight.dense_NK, axis=1)
            assert (np.abs(together - alone) <= CLOSE * lengths).all()
            np.testing.assert_array_equal(together, product(node, weight, x), "the same twice")


def refusals() -> None:
    """Shapes that do not fit are named before anything is read."""
    weight = matrix(4, 64, 4, 32, True, "float32")
    x = np.zeros((2, 64), np.float32)
    node = node_of(weight)
    good: dict[str, Array] = {name: np.asarray(array) for name, array in weight.inputs.items()} | {"x": x}
    wrong: dict[str, Array] = {
        "x": x[:, :63],
        "packed": good["packed"][:3],
        "scale": good["scale"][:, :1],
        "zero": np.zeros((4, 2), np.uint8),
    }
    for name, array in wrong.items():
        assert "QuantizedMatMul needs" in _refusal(partial(node.run, good | {name: array})), name
    for change in ({"bits": 5}, {"block_size": 48}, {"block_size": 512}, {"K": 0}):
        attributes = weight.attributes | change
        inputs = {"x": x, **weight.inputs}
        text = _refusal(partial(Node, "QuantizedMatMul", inputs, {"y": np.float32}, attributes))
        assert "quanti" in text or "QuantizedMatMul" in text, text


def _refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Exception as error:  # ONNX Runtime's own classes, which differ from call to call
        return str(error)
    raise AssertionError("what does not fit was accepted")


def _grid() -> Iterator[tuple[str, Callable[[], None]]]:
    for bits in (4, 8):
        for block in BLOCKS:
            for zeros in (False, True):
                yield f"{bits}-bits-block-{block}{'-zeros' if zeros else ''}", partial(check, bits, block, zeros)


def cases() -> dict[str, Callable[[], None]]:
    """Name to case."""
    others = (many_rows, ranks, magnitudes, halves_to_even, not_finite, each_row_alone, refusals)
    return dict(_grid()) | {case.__name__.replace("_", "-"): case for case in others}


if __name__ == "__main__":
    main(cases())
