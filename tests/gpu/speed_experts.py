"""How fast mixtures of experts and sampling are, at Mixtral 8x7B's size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from runtime.kernels.cuda.mixture_of_experts import (
    MixtureProblem,
    MixtureTensors,
    launch_mixture_of_experts,
    mixture_workspace_bytes,
)
from runtime.kernels.cuda.moe_gate import GateProblem, GateTensors, launch_moe_gate
from runtime.kernels.cuda.top_logits import TopProblem, TopTensors, launch_top_logits, top_logits_workspace_bytes
from tests.gpu.bench import Bench

SECTION, SAMPLING = "mixture of experts", "gate and sampling"
OF_BANDWIDTH = 0.85


@dataclass(frozen=True, slots=True)
class Size:
    experts: int = 8
    chosen: int = 2
    hidden: int = 4096
    intermediate: int = 14336


MIXTRAL, TINY = Size(), Size(4, 2, 64, 104)


@dataclass(frozen=True, slots=True)
class _Stacks:
    gate: Any
    up: Any
    down: Any


def _stacks(bench: Bench, size: Size) -> _Stacks:
    E, C, I = size.experts, size.hidden, size.intermediate
    wide = bench.random(E, I, C, scale=C**-0.5), bench.random(E, I, C, scale=C**-0.5)
    return _Stacks(*wide, bench.random(E, C, I, scale=I**-0.5))


def measure_experts(bench: Bench) -> None:
    """Few tokens, whose experts' weights are what has to be read, and many."""
    size = TINY if bench.small else MIXTRAL
    stacks = _stacks(bench, size)
    for tokens, distinct in ((1, 2), (2, 4), (4, 8), (4, 2), (8, 8)):
        if distinct <= size.experts:
            bench.book.attempt(
                f"decode, {tokens} tokens, {distinct} experts",
                partial(_decode, bench, size, stacks, tokens, distinct),
            )
    for tokens in (20,) if bench.small else (512, 2048, 8192):
        bench.book.attempt(
            f"prefill, {tokens} tokens",
            partial(_prefill, bench, size, stacks, tokens),
        )


def _decode(bench: Bench, size: Size, stacks: _Stacks, tokens: int, distinct: int) -> None:
    """The tokens' experts are spread evenly over `distinct` ones, which ones changes from call to call."""
    calls = []
    for shift in range(0, size.experts, max(1, size.experts // 4)):
        chosen = [
            [(shift + (size.chosen * token + k) % distinct) % size.experts for k in range(size.chosen)]
            for token in range(tokens)
        ]
        calls.append(bench.integers(chosen))
    step, y = _mixture(bench, size, stacks, tokens)
    taken = bench.clock.median([partial(step, expert) for expert in calls])
    nbytes = distinct * 3 * size.hidden * size.intermediate * 2
    name = f"decode, {tokens} tokens, {distinct} of {size.experts} experts"
    bench.tell_bandwidth(SECTION, name, taken, nbytes, OF_BANDWIDTH)
    bench.finite(name, y)


def _mixture(bench: Bench, size: Size, stacks: _Stacks, tokens: int) -> tuple[Any, Any]:
    """What launches it for given experts [N, K], and its result."""
    problem = MixtureProblem(tokens, size.hidden, size.intermediate, size.experts, size.chosen, "silu", "bfloat16")
    x, y = bench.random(tokens, size.hidden), bench.random(tokens, size.hidden)
    weight = bench.random(tokens, size.chosen, dtype="float32").softmax(-1)
    workspace = bench.empty(mixture_workspace_bytes(problem, bench.limits))

    def step(expert: Any) -> None:
        tensors = (x, weight, expert, stacks.gate, stacks.up, stacks.down, y, workspace)
        addresses = MixtureTensors(*(tensor.data_ptr() for tensor in tensors))
        launch_mixture_of_experts(bench.launcher(), problem, addresses)

    return step, y


def _prefill(bench: Bench, size: Size, stacks: _Stacks, tokens: int) -> None:
    order = bench.random(tokens, size.experts, dtype="float32").argsort(dim=-1)
    expert = order[:, : size.chosen].contiguous()
    step, y = _mixture(bench, size, stacks, tokens)
    taken = bench.clock.median([lambda: step(expert)])
    flops = 6 * tokens * size.chosen * size.hidden * size.intermediate
    name = f"prefill, {tokens} tokens"
    bench.tell_flops(SECTION, name, taken, flops)
    bench.finite(name, y)

    def theirs() -> None:
        counts = [int((expert == e).sum()) for e in range(size.experts)]
        rows = [bench.random(max(count, 1), size.hidden) for count in counts]
        silu = bench.torch.nn.functional.silu

        def products() -> None:
            for e, x in enumerate(rows):
                hidden = silu(x @ stacks.gate[e].t()) * (x @ stacks.up[e].t())
                hidden @ stacks.down[e].t()

        said = f"torch's products alone, expert by expert, {tokens} tokens sorted before"
        bench.tell_flops(SECTION, said, bench.clock.median([products]), flops)

    bench.against(f"torch's products for {tokens} tokens", theirs)


def measure_sampling(bench: Bench) -> None:
    """The gate, and the best of a vocabulary's logits."""
    for tokens in (5,) if bench.small else (1, 2048):
        bench.book.attempt(f"gate, {tokens} tokens", partial(_gate, bench, tokens))
    for vocabulary in (5000,) if bench.small else (32768, 131072):
        for rows, k in ((1, 1), (1, 50), (8, 50), (32, 50)):
            bench.book.attempt(
                f"top {k} of {vocabulary}",
                partial(_top, bench, rows, vocabulary, k),
            )


def _gate(bench: Bench, tokens: int) -> None:
    problem = GateProblem(tokens, 8, 2)
    logits = bench.random(tokens, 8, dtype="float32")
    weight, expert = bench.random(tokens, 2, dtype="float32"), bench.integers([[0, 0]] * tokens)
    tensors = GateTensors(logits.data_ptr(), weight.data_ptr(), expert.data_ptr())
    taken = bench.clock.median([lambda: launch_moe_gate(bench.launcher(), problem, tensors)])
    bench.tell_bandwidth(SAMPLING, f"gate, 2 of 8 for {tokens} tokens, in the cache", taken, tokens * (32 + 8 + 16))

    def theirs() -> None:
        def run() -> None:
            best = logits.topk(2, dim=-1)
            best.values.softmax(-1)

        taken = bench.clock.median([run])
        bench.tell_bandwidth(SAMPLING, f"torch's topk and softmax for {tokens} tokens", taken, tokens * (32 + 8 + 16))

    bench.against(f"torch's gate for {tokens} tokens", theirs)


def _top(bench: Bench, rows: int, vocabulary: int, k: int) -> None:
    problem = TopProblem(rows, vocabulary, k)
    sets = min(8, bench.rotations(rows * vocabulary * 4))
    logits = [bench.random(rows, vocabulary, dtype="float32") for _ in range(sets)]
    values, ids = bench.random(rows, k, dtype="float32"), bench.integers([[0] * k] * rows, "int32")
    workspace = bench.empty(top_logits_workspace_bytes(problem, bench.limits))
    calls = [TopTensors(given.data_ptr(), values.data_ptr(), ids.data_ptr(), workspace.data_ptr()) for given in logits]

    def step(tensors: TopTensors) -> None:
        launch_top_logits(bench.launcher(), problem, tensors)

    taken = bench.clock.median([partial(step, call) for call in calls])
    nbytes = rows * vocabulary * 4
    bench.tell_bandwidth(SAMPLING, f"top {k} of {vocabulary}, {rows} rows", taken, nbytes)

    def theirs() -> None:
        taken = bench.clock.median([partial(given.topk, k, dim=-1) for given in logits])
        bench.tell_bandwidth(SAMPLING, f"torch's topk of {k} of {vocabulary}, {rows} rows", taken, nbytes)

    bench.against(f"torch's topk of {k} of {vocabulary}", theirs)
