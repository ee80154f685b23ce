"""Cases of StoredMatMul, for this process's level of instructions: against float64, bit by bit where it is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from reference.parity import budget, position_errors
from runtime.kernels import counters
from tests.support.kernels import Array, Node, main

TYPES: dict[str, npt.DTypeLike] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
Floats = npt.NDArray[np.float32]


def product(x: Floats, weight_NK: Array, threads: int = 1) -> Floats:
    """StoredMatMul on its kernel."""
    inputs = {"x": x, "weight": weight_NK}
    return np.asarray(Node("StoredMatMul", inputs, {"y": np.float32}, {}, threads=threads).run(inputs)["y"], np.float32)


def check(leading: tuple[int, ...], N: int, K: int, kind: str, threads: int) -> None:
    rng = np.random.default_rng([N, K, *leading])
    x = rng.standard_normal((*leading, K), dtype=np.float32)
    weight_NK = rng.standard_normal((N, K)).astype(TYPES[kind])
    found = product(x, weight_NK, threads)
    assert found.shape == (*leading, N)
    if found.size == 0:
        return
    wide = weight_NK.astype(np.float64)
    rows = x.reshape(found.size // N, K)
    truth, plain = rows.astype(np.float64) @ wide.T, rows @ weight_NK.astype(np.float32).T
    allowed = budget([truth], [plain], "float32").allowed
    assert position_errors(truth, found.reshape(-1, N)).max() <= allowed


def check_every_number(kind: str) -> None:
    """All 65536 patterns come out as the float32 that they are: alone in their rows, and in whole vectors by ones."""
    every = np.arange(65536, dtype=np.uint16).view(TYPES[kind])
    wide = every.astype(np.float32)
    if kind == "bfloat16":
        # Its denormals are float32's, which the runtime's threads take for zeros.
        every, wide = every[np.abs(wide) >= np.float32(2**-126)], wide[np.abs(wide) >= np.float32(2**-126)]
    for M in (1, 9):
        np.testing.assert_array_equal(product(np.ones((M, 1), np.float32), every[:, None]), np.tile(wide, (M, 1)))
    finite = np.isfinite(wide)
    every, wide = (array[finite][: finite.sum() // 16 * 16].reshape(-1, 16) for array in (every, wide))
    one_hot = np.eye(16, dtype=np.float32)
    for rows in (one_hot[:8], one_hot[8:], one_hot):
        np.testing.assert_array_equal(product(rows, every), rows @ wide.T)


def check_rows_of_one_product(kind: str) -> None:
    """A row's result depends on its own numbers, on however many others there are."""
    rng = np.random.default_rng(7)
    x, weight_NK = rng.standard_normal((40, 70), dtype=np.float32), rng.standard_normal((50, 70)).astype(TYPES[kind])
    x[3], x[39] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        found = product(x, weight_NK)
    for M in (1, 5, 9, 17):
        some = product(x[4 : 4 + M], weight_NK)
        np.testing.assert_allclose(some, found[4 : 4 + M], rtol=1e-5, atol=1e-4)
    assert np.isnan(found[3]).all()
    assert not np.isfinite(found[39]).any()


def check_threads(kind: str) -> None:
    """Two threads give the same bits as one."""
    rng = np.random.default_rng(8)
    weight_NK = rng.standard_normal((500, 300)).astype(TYPES[kind])
    for M in (1, 6, 300):
        x = rng.standard_normal((M, 300), dtype=np.float32)
        np.testing.assert_array_equal(product(x, weight_NK, 2), product(x, weight_NK, 1))


def check_refusals() -> None:
    x, weight_NK = np.ones((2, 5), np.float32), np.ones((3, 4), np.float32)
    with pytest.raises(Exception, match="the same K"):
        product(x, weight_NK)


def check_bytes(kind: str) -> None:
    """The weight is counted once a call, however many rows it is multiplied with."""
    weight_NK = np.ones((30, 20), TYPES[kind])
    for M in (1, 50):
        before = sum(counter.bytes for counter in counters() if counter.op == "StoredMatMul")
        product(np.ones((M, 20), np.float32), weight_NK)
        after = sum(counter.bytes for counter in counters() if counter.op == "StoredMatMul")
        assert after - before == weight_NK.nbytes


def _sizes() -> Iterator[tuple[tuple[int, ...], int, int]]:
    columns = (1, 5, 15, 16, 17, 31, 32, 33, 100, 255, 256, 257, 300)
    rows = (1, 3, 4, 16, 17, 47, 48, 50, 97, 150)
    for i, M in enumerate((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 100)):
        for j in range(4):
            yield (M,), rows[(3 * i + j) % len(rows)], columns[(5 * i + 3 * j) % len(columns)]
    yield (), 7, 9
    yield (2, 3), 7, 9
    yield (4, 1, 10), 20, 40
    yield (2, 0), 7, 9
    yield (3,), 0, 9
    yield (2,), 5, 0
    yield (20,), 5, 0
    yield (3,), 12, 7000  # more of x than stays in the first-level cache
    yield (600,), 100, 40  # more rows than one product of panels has


def cases() -> dict[str, Callable[[], None]]:
    """Name to case, for each type of weight."""
    every: dict[str, Callable[[], None]] = {"refusals": check_refusals}
    for kind in TYPES:
        for i, (leading, N, K) in enumerate(_sizes()):
            every[f"size-{i}-{kind}"] = partial(check, leading, N, K, kind, 1 + i % 2)
        every[f"rows-{kind}"] = partial(check_rows_of_one_product, kind)
        every[f"threads-{kind}"] = partial(check_threads, kind)
        every[f"bytes-{kind}"] = partial(check_bytes, kind)
        if kind != "float32":
            every[f"numbers-{kind}"] = partial(check_every_number, kind)
    return every


if __name__ == "__main__":
    main(cases())
