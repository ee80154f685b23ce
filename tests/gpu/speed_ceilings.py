"""What the device can do, measured in the same run as everything that is held against it."""

from __future__ import annotations

from functools import partial

from tests.gpu.bench import COPY, MATMUL, READ, Bench

SECTION = "ceilings"


def measure(bench: Bench) -> None:
    """Bandwidth of a copy, bytes read and written; of reading alone; and the speed of a large bf16 matrix product."""
    bench.book.attempt("device copy", lambda: _copy(bench))
    bench.book.attempt("device read", lambda: _read(bench))
    bench.book.attempt("matrix product", lambda: _matmul(bench))


def _copy(bench: Bench) -> None:
    count = 1 << (16 if bench.small else 30)
    source = bench.random(count // 4, dtype="float32")
    pairs = [(source, bench.torch.empty_like(source)) for _ in range(2)]
    best = 0.0
    for _ in range(2):
        taken = bench.clock.median([partial(b.copy_, a) for a, b in pairs])
        best = max(best, 2 * count / taken / 1e3)
    bench.book.fact(COPY, best)


def _read(bench: Bench) -> None:
    count = 1 << (16 if bench.small else 30)
    parts = [bench.random(count // 4, dtype="float32") for _ in range(2)]
    taken = bench.clock.median([partial(part.sum) for part in parts])
    bench.book.fact(READ, count / taken / 1e3)


def _matmul(bench: Bench) -> None:
    size = 64 if bench.small else 8192
    left, right = (bench.random(size, size + shift)[:, :size].contiguous() for shift in (0, 8))
    out = bench.torch.empty_like(left)
    best = 0.0
    for _ in range(2):
        taken = bench.clock.median([lambda: bench.torch.mm(left, right, out=out)])
        best = max(best, 2 * size**3 / taken / 1e6)
    bench.book.fact(MATMUL, best)
