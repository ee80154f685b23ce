"""How fast rolling attention is: against the device's bandwidth and arithmetic, and against torch's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from runtime.kernels.cuda.rolling_attention import launch_rolling_attention, rolling_attention_workspace_bytes
from runtime.kernels.cuda.rolling_prefill import launch_rolling_prefill
from runtime.kernels.cuda.rolling_problem import RollingProblem, RollingTensors
from runtime.kernels.cuda.rolling_write import launch_write
from tests.gpu.bench import Bench
from tests.gpu.findings import Timing

SECTION = "rolling attention"
_BYTES = {"bfloat16": 2, "float8": 1}
OF_BANDWIDTH, OF_TORCH_PREFILL, OF_TORCH_DECODE = 0.85, 0.8, 1.0
"""Targets: decode's share of the copy's bandwidth from batch 8 on; speeds as multiples of torch's."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Mistral 7B's: window, and the longest chunk that a ring has room for."""

    window: int = 4096
    chunk: int = 512
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def problem(self, batch: int, tokens: int, slots: int, ring: str = "bfloat16") -> RollingProblem:
        return RollingProblem(
            batch=batch,
            tokens=tokens,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            slots=slots,
            window=self.window,
            scale=self.head_dim**-0.5,
            interleaved=False,
            activations="bfloat16",
            ring=ring,
        )


MISTRAL, TINY = Shape(), Shape(window=40, chunk=9, heads=4, kv_heads=2, head_dim=16)


@dataclass(frozen=True, slots=True)
class _Call:
    """A problem with `sets` of rings, as tensors of torch. held: what must not be freed."""

    problem: RollingProblem
    tensors: tuple[RollingTensors, ...]
    attended: Any
    held: tuple[Any, ...]


def _call(bench: Bench, problem: RollingProblem, starts: list[int], sets: int) -> _Call:
    B, T, H, G, D, S = (
        getattr(problem, name) for name in ("batch", "tokens", "heads", "kv_heads", "head_dim", "slots")
    )
    rings = [tuple(bench.random(B, G, S, D, dtype=problem.ring) for _ in range(2)) for _ in range(sets)]
    named = {
        "query": bench.random(B, T, H, D),
        "key": bench.random(B, T, G, D),
        "value": bench.random(B, T, G, D),
        "cos": bench.random(B, T, D // 2, dtype="float32"),
        "sin": bench.random(B, T, D // 2, dtype="float32"),
        "start": bench.integers(starts),
        "count": bench.integers([T] * B),
        "attended": bench.random(B, T, H, D),
        "workspace": bench.empty(rolling_attention_workspace_bytes(problem, bench.limits)),
    }
    at = {name: tensor.data_ptr() for name, tensor in named.items()}
    tensors = tuple(RollingTensors(key_ring=key.data_ptr(), value_ring=value.data_ptr(), **at) for key, value in rings)
    return _Call(problem, tensors, named["attended"], (rings, named))


# -- decode --


def measure_decode(bench: Bench) -> None:
    """One token a row past the window, so that W positions are visible; rings in bfloat16 and float8."""
    shape = TINY if bench.small else MISTRAL
    for ring in ("bfloat16", "float8"):
        for batch in (1, 2) if bench.small else (1, 8, 32):
            bench.book.attempt(
                f"decode, batch {batch}, {ring}",
                partial(_decode, bench, shape, batch, ring),
            )


def _decode(bench: Bench, shape: Shape, batch: int, ring: str) -> None:
    slots = shape.window + shape.chunk - 1
    problem = shape.problem(batch, 1, slots, ring)
    nbytes = 2 * batch * shape.kv_heads * shape.window * shape.head_dim * _BYTES[ring]
    starts = [shape.window + 97 * (row + 1) for row in range(batch)]
    call = _call(bench, problem, starts, bench.rotations(nbytes))

    def step(tensors: RollingTensors) -> None:
        launch_rolling_attention(bench.launcher(), problem, tensors)

    taken = bench.clock.median([partial(step, tensors) for tensors in call.tensors])
    name = f"decode, W {shape.window}, batch {batch}, {ring} rings"
    target = OF_BANDWIDTH if batch >= 8 and ring == "bfloat16" else None
    bench.tell_bandwidth(SECTION, name, taken, nbytes, target)
    bench.finite(name, call.attended)
    if ring == "bfloat16":
        del call
        theirs = _torch_attention(bench, shape, batch, 1, shape.window, causal=False)
        _compare(bench, name, taken, theirs)


def _compare(bench: Bench, name: str, ours: float, theirs: dict[str, float]) -> None:
    if theirs:
        best = min(theirs, key=lambda backend: theirs[backend])
        said = f"torch's sdpa ({best}), as fast as which is 1"
        speed_up = theirs[best] / ours
        bench.book.add(
            Timing(SECTION, f"{name}, beside torch", ours, theirs[best], "µs of torch", speed_up, said, OF_TORCH_DECODE)
        )


# -- torch --


def _backends(bench: Bench) -> Iterator[tuple[str, Any]]:
    names = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
    kinds = bench.torch.nn.attention.SDPBackend
    for label, name in names.items():
        if hasattr(kinds, name):
            yield label, getattr(kinds, name)


def _torch_attention(
    bench: Bench, shape: Shape, batch: int, tokens: int, keys: int, *, causal: bool
) -> dict[str, float]:
    """Microseconds of torch's attention without a mask or with the causal one, by backend."""
    import torch.nn.attention  # torch itself does not load it

    H, G, D = shape.heads, shape.kv_heads, shape.head_dim
    sets = bench.rotations(4 * batch * G * keys * D)
    query = bench.random(batch, H, tokens, D)
    rings = [tuple(bench.random(batch, G, keys, D) for _ in range(2)) for _ in range(sets)]
    attend: Callable[..., Any] = bench.torch.nn.functional.scaled_dot_product_attention
    found: dict[str, float] = {}
    for label, kind in _backends(bench):

        def run(label: str = label, kind: Any = kind) -> None:
            with bench.torch.no_grad(), torch.nn.attention.sdpa_kernel(kind):
                found[label] = bench.clock.median(
                    [partial(attend, query, k, v, is_causal=causal, enable_gqa=True) for k, v in rings]
                )

        bench.against(f"torch's sdpa ({label}) of {tokens} tokens and {keys} keys, batch {batch}", run)
    return found


# -- prefill and write --


def measure_prefill(bench: Bench) -> None:
    """A prompt of twice the window in one chunk, and chunks of a session's size in the middle of a text."""
    shape = TINY if bench.small else MISTRAL
    whole = 2 * shape.window
    bench.book.attempt(f"prefill, {whole} tokens", lambda: _prefill(bench, shape, whole, 0, compare=True))
    start = 3 * shape.window
    for tokens in (shape.chunk, 4 * shape.chunk):
        bench.book.attempt(
            f"prefill, {tokens} tokens later on",
            partial(_prefill, bench, shape, tokens, start, compare=False),
        )


def visible_pairs(window: int, tokens: int, start: int) -> int:
    """Of a query and a key that it sees."""
    return sum(min(start + t + 1, window) for t in range(tokens))


def _prefill(bench: Bench, shape: Shape, tokens: int, start: int, *, compare: bool) -> None:
    problem = shape.problem(1, tokens, shape.window + tokens - 1)
    call = _call(bench, problem, [start], 2)
    flops = 4 * shape.heads * shape.head_dim * visible_pairs(shape.window, tokens, start)
    where = f"{tokens} tokens from {start}, W {shape.window}"

    def write(tensors: RollingTensors) -> None:
        launch_write(bench.launcher(), problem, tensors, rotated_query=tensors.workspace)

    def attend(tensors: RollingTensors) -> None:
        launch_rolling_prefill(bench.launcher(), problem, tensors, tensors.workspace)

    written = bench.clock.median([partial(write, t) for t in call.tensors])
    rows = 2 * shape.heads + 4 * shape.kv_heads  # read and written
    table_bytes = 2 * tokens * shape.head_dim // 2 * 4
    bench.tell_bandwidth(SECTION, f"write, {where}", written, rows * tokens * shape.head_dim * 2 + table_bytes)
    taken = bench.clock.median([partial(attend, t) for t in call.tensors])
    ours = bench.tell_flops(SECTION, f"prefill, {where}", taken, flops)
    bench.finite(f"prefill, {where}", call.attended)
    if compare:
        pairs = tokens * (tokens + 1) // 2
        theirs = _torch_attention(bench, shape, 1, tokens, tokens, causal=True)
        for label, microseconds in theirs.items():
            dense = 4 * shape.heads * shape.head_dim * pairs
            speed = bench.tell_flops(SECTION, f"torch's causal sdpa ({label}), {tokens} tokens", microseconds, dense)
            target = OF_TORCH_PREFILL if label == "flash" else None
            said = f"torch's sdpa ({label}) per visible FLOP"
            name = f"prefill, {where}, beside torch ({label})"
            bench.book.add(Timing(SECTION, name, taken, ours, "TFLOP/s", ours / speed, said, target))
