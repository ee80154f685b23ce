"""Rolling attention's kernels at every border, on the device at hand, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from runtime.kernels.cuda.rolling_decode import decode_workspace_bytes, launch_decode
from runtime.kernels.cuda.rolling_prefill import PrefillTiling
from tests.gpu.device import CheckedDevice
from tests.gpu.findings import Notebook
from tests.kernels.cuda import rolling_cases, rolling_decode_cases, rolling_prefill_cases, rolling_write_cases
from tests.kernels.cuda.rolling_cases import RollingCase, RollingInputs, RollingResults
from tests.support.kernel_devices import Device

Run = Callable[[Device, RollingCase, RollingInputs], RollingResults]
_LOOKED_AT = 60
"""Tokens of a long chunk whose attention is computed in float64, for all heads."""


def check_twice(device: Device, case: RollingCase, run: Run, tokens: Iterable[int] | None = None) -> float:
    """The case within its budget, and the same bits when it runs again. Returns the share of the budget."""
    inputs = rolling_cases.inputs_of(case)
    results = run(device, case, inputs)
    rolling_cases.check_rings(case, inputs, results)
    worst = rolling_cases.check_attended(case, inputs, results, None if tokens is None else frozenset(tokens))
    same_bits(results, run(device, case, inputs))
    return worst


def same_bits(first: RollingResults, again: RollingResults) -> None:
    """But for those of NaN, of which there are many spellings."""
    for name in RollingResults.__slots__:
        left, right = getattr(first, name), getattr(again, name)
        np.testing.assert_array_equal(left.astype(np.float32), right.astype(np.float32), f"{name} changed")


def decode_run(device: Device, case: RollingCase, inputs: RollingInputs) -> RollingResults:
    return rolling_cases.run(device, case, inputs, launch_decode, decode_workspace_bytes)


def prefill_run(tiling: PrefillTiling | None) -> Run:
    """With this tiling, or the device's own."""

    def run(device: Device, case: RollingCase, inputs: RollingInputs) -> RollingResults:
        return rolling_prefill_cases.run(device, case, inputs, tiling)

    return run


def check_decode(device: CheckedDevice, book: Notebook, cases: Iterable[tuple[str, RollingCase]]) -> None:
    """Steps of one token a row."""
    for name, case in cases:
        fresh = seeded(case, book)
        book.check(name, partial(check_twice, device, fresh, decode_run))


def check_prefill(device: CheckedDevice, book: Notebook, cases: Iterable[tuple[str, RollingCase]]) -> None:
    """Chunks: every token of short ones with small tiles and the device's own, chosen tokens of long ones."""
    for name, case in cases:
        fresh = seeded(case, book)
        if case.tokens <= 300:
            for label, tiling in (("", None), (" in small tiles", rolling_prefill_cases.SMALL)):
                if tiling is not None and case.tokens > 60:
                    continue
                run = prefill_run(tiling)
                book.check(name + label, partial(check_twice, device, fresh, run))
        else:
            tokens = _borders_of_tiles(fresh, book.seed)
            run = prefill_run(None)
            book.check(
                f"{name}, {len(tokens)} tokens of it",
                partial(check_twice, device, fresh, run, tokens),
            )


def check_prefill_rules(device: CheckedDevice, book: Notebook) -> None:
    """Faults stay where they are; bits depend on a token's own row alone, and on no chunks. Other devices' tilings."""
    cases = rolling_prefill_cases
    tiling = PrefillTiling(warps=1, row_blocks=2, keys=48)
    book.check("NaN shows to those that see it", lambda: cases.check_faults_are_seen_where_they_are(device))
    book.check("NaN in large tiles", lambda: cases.check_faults_are_seen_where_they_are(device, tiling))
    book.check("NaN in a query stays there", lambda: cases.check_query_faults_stay(device))
    book.check("bits do not depend on chunks", lambda: cases.check_chunks_do_not_matter(device, None))
    book.check(
        "bits do not depend on chunks, in small tiles", lambda: cases.check_chunks_do_not_matter(device, cases.SMALL)
    )
    book.check("bits do not depend on other rows", lambda: cases.check_rows_do_not_matter(device))
    for name, (case, limits) in cases.size_cases().items():
        other, fresh = device.believing(limits), seeded(case, book)
        book.check(
            f"tiling of {name}",
            partial(check_twice, other, fresh, prefill_run(None)),
        )


def check_write(device: CheckedDevice, book: Notebook, cases: Iterable[tuple[str, RollingCase]]) -> None:
    """Rings and rotated queries, every bit."""
    for name, case in cases:
        fresh = seeded(case, book)
        book.check(name, partial(rolling_write_cases.check_write, device, fresh))


def seeded(case: RollingCase, book: Notebook) -> RollingCase:
    """The case with numbers of this run."""
    return replace(case, seed=book.seed + case.seed)


def decode_cases(large: bool) -> Iterator[tuple[str, RollingCase]]:
    for name, case in rolling_decode_cases.small_cases():
        yield f"decode {name}", case
    if large:
        for name, case in rolling_decode_cases.large_cases():
            yield f"decode large {name}", case


def prefill_cases(large: bool) -> Iterator[tuple[str, RollingCase]]:
    cases = rolling_prefill_cases
    for name, case in itertools.chain(
        *(table().items() for table in (cases.window_cases, cases.row_cases, cases.head_cases, cases.type_cases))
    ):
        yield f"prefill {name}", case
    if large:
        for name, case in long_chunks():
            yield f"prefill {name}", case


def long_chunks() -> Iterator[tuple[str, RollingCase]]:
    """Mistral's heads at the lengths that speed is measured at, and chunks around the tiles of real sizes."""
    mistral = RollingCase(4096, 4096 + 8191, (0,), (8192,), 8192, heads=32, kv_heads=8, head_dim=128)
    for ring in ("bfloat16", "float8"):
        yield f"mistral-8192-{ring}", replace(mistral, ring=ring)
    later = replace(mistral, slots=4096 + 2047, starts=(5000, 2**31 + 7), counts=(2048, 2000), tokens=2048)
    yield "mistral-2048-later", later
    yield "full-3000", replace(mistral, window=0, slots=5000, starts=(1999,), counts=(3000,), tokens=3000)
    for head_dim, tokens in itertools.product((16, 64, 96, 128, 160, 256), (127, 128, 129)):
        case = RollingCase(90, 90 + tokens, (300, 0), (tokens, tokens - 2), tokens, head_dim=head_dim, heads=8)
        yield f"head-dim-{head_dim}-tokens-{tokens}", case
    for activations, ring in itertools.product(("bfloat16", "float16"), ("bfloat16", "float16", "float8")):
        yield (
            f"{activations}-with-{ring}-tokens-200",
            RollingCase(150, 349, (77,), (200,), 200, head_dim=128, heads=8, activations=activations, ring=ring),
        )


def write_cases(large: bool) -> Iterator[tuple[str, RollingCase]]:
    for name, case in rolling_write_cases.small_cases():
        yield f"write {name}", case
    if large:
        for name, case in rolling_write_cases.large_cases():
            yield f"write large {name}", case


def _borders_of_tiles(case: RollingCase, seed: int) -> list[int]:
    """Tokens at the ends of the chunk, of tiles and of the window, and some in between."""
    ends = {0, 1, 63, 64, 127, 128, case.window - 1, case.window, case.tokens // 2, case.tokens - 1}
    inside = [token for token in sorted(ends) if 0 <= token < case.tokens]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, case.tokens, max(0, _LOOKED_AT - len(inside)))
    return [*inside, *(int(token) for token in drawn)]
