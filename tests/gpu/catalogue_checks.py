"""A case for every kernel that builds ask for: a small problem that its launcher answers with that very kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from runtime.kernels.cuda.launch import DeviceLimits, Kernel
from runtime.kernels.cuda.mixture_of_experts import MixtureProblem, PackedMatrices, mixture_kernels
from runtime.kernels.cuda.mixture_problem import SCALES
from runtime.kernels.cuda.rolling_attention import rolling_attention_kernels
from runtime.kernels.cuda.rolling_types import DEVICE_TYPES
from tests.gpu.attention_checks import check_twice, decode_run, prefill_run, seeded
from tests.gpu.device import CheckedDevice, described
from tests.gpu.expert_checks import AnyMixture, check_mixture_twice, check_top_logits
from tests.gpu.findings import Notebook
from tests.kernels.cuda.moe_cases import check_gate, mixture, packed_mixture
from tests.kernels.cuda.rolling_cases import RollingCase
from tests.kernels.cuda.rolling_decode_cases import step

_NAMES = {theirs: ours for ours, theirs in DEVICE_TYPES.items()}
_SCALES = {theirs: ours for ours, theirs in SCALES.items()}
_GROUPS = (4, 1, 2, 3, 6, 8, 12, 16)
_TOKENS = (1, 2, 4, 8, 12, 16, 24, 40, 64, 80, 150, 300, 600)
_SIZES = ((136, 200), (64, 776), (64, 1544), (64, 3080), (64, 6152), (64, 14336), (72, 40))


def check_kernels(device: CheckedDevice, book: Notebook, kernels: Iterable[Kernel]) -> None:
    """Run each kernel in its own op, and hold that op to its budget."""
    for kernel in kernels:
        run = _run_of(kernel, device, book)
        if run is None:
            book.skip(described(kernel), "no problem of this script is answered with it on this device")
        else:
            book.check(described(kernel), run)


def _run_of(kernel: Kernel, device: CheckedDevice, book: Notebook) -> Callable[[], float | None] | None:
    limits = device.launcher.limits
    if kernel.name.startswith("rolling_"):
        for case in _attention(kernel):
            if kernel in rolling_attention_kernels(case.problem, limits):
                run = decode_run if case.tokens == 1 else prefill_run(None)
                return partial(check_twice, device, seeded(case, book), run)
        return None
    rng = np.random.default_rng(book.seed)
    if kernel.name == "moe_gate":
        logits = rng.standard_normal((9, 32 * int(kernel.definitions["PER_LANE"])), dtype=np.float32)
        return partial(check_gate, device, logits, 2)
    if kernel.name.startswith("moe_"):
        found = _mixture(kernel, limits, book.seed)
        return None if found is None else partial(check_mixture_twice, device, found)
    if kernel.name == "top_logits":
        alone = int(kernel.definitions["FROM_LOGITS"]) and int(kernel.definitions["LAST"])
        top = rng.standard_normal((2, 3000 if alone else 20000), dtype=np.float32)
        return partial(check_top_logits, device, top, 50)
    return None


def _attention(kernel: Kernel) -> Iterator[RollingCase]:
    """Cases of the kernel's types and head dim."""
    given = kernel.definitions
    sizes = {
        "head_dim": int(given["HEAD_DIM"]),
        "activations": _NAMES[str(given["ACTIVATION"])],
        "ring": _NAMES[str(given["RING"])],
        "interleaved": bool(int(given.get("INTERLEAVED", 0))),
    }
    for group, tokens in itertools.product(_GROUPS, (1, 150, 5)):
        if tokens == 1:
            yield step(600, 640, (0, 5, -1, 599, 5000, 2**31 + 5), heads=2 * group, **sizes)
        else:
            counts = (tokens, tokens - 2)
            yield RollingCase(200, 203 + tokens, (0, 450), counts, tokens, heads=2 * group, **sizes)  # type: ignore[arg-type]


def _mixture(kernel: Kernel, limits: DeviceLimits, seed: int) -> AnyMixture | None:
    """The first that the launcher answers with this kernel."""
    given = kernel.definitions
    element, activation = _NAMES[str(given.get("ELEMENT", "BFloat16"))], str(given.get("GATED_BY", "silu"))
    stored = None
    if "BITS" in given:
        scales, zero_points = _SCALES[str(given["SCALE"])], bool(int(given["ZEROS"]))
        stored = PackedMatrices(int(given["BITS"]), 32, scales, zero_points)
    for tokens, (C, I) in itertools.product(_TOKENS, _SIZES):
        problem = MixtureProblem(tokens, C, I, 4, 2, activation, element, stored)
        if kernel not in mixture_kernels(problem, limits):
            continue
        if stored is not None:
            return packed_mixture(tokens, 2, 4, C, I, stored, element=element, seed=seed)
        return mixture(tokens, 2, 4, C, I, element=element, activation=activation, seed=seed)
    return None
