"""The other side: transformers with the same random weights, on the same GPU, in the same run.

Decoding with a static cache and torch.compile, a prompt with sdpa attention. Its logits in float32 and in the engine's
arithmetic are also the measure for those that the engine left of a text that ends behind the window.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.bench import Bench
from tests.gpu.findings import Timing
from tests.gpu.ort_speed import (
    DECODE,
    PREFILL,
    SECTION,
    Lengths,
    crossing_text,
    figure_name,
    lengths_of,
    logits_file,
    random_tokens,
    timed,
)
from tests.gpu.ort_weights import Shape, made

DECODE_TARGET, PREFILL_TARGET = 1.2, 1.0
_COMPILED: tuple[dict[str, Any], ...] = (
    {"mode": "reduce-overhead", "fullgraph": True},
    {"mode": "reduce-overhead"},
    {"mode": "default"},
)
"""Ways to compile a step; the first that works is taken."""
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Rival:
    """transformers' model, which `model()` loads once. Without a window: no text that is timed reaches it, and so the
    static cache is the plain one, which is the faster."""

    bench: Bench
    shape: Shape
    model: Callable[[], Any]


def compare(bench: Bench, folder: Path, shape: Shape, work: Path) -> None:
    """Speeds of transformers and what the engine's, known from before, are beside them; then the logits."""
    book, opened = bench.book, list[Any]()

    def model() -> Any:
        if not opened:
            opened.append(_load(bench, made(bench, folder, shape, work), shape))
        return opened[0]

    def loads() -> None:
        model()

    rival = Rival(bench, shape, model)
    if not book.check(f"{shape.name}: transformers loads the same weights", loads):
        return
    book.attempt(f"{shape.name}: prefill of transformers", partial(_prefill, rival))
    what = f"{shape.name}: the last logits of a text behind the window, within the budget of transformers"
    path = logits_file(work, shape.name)
    if path.is_file():
        book.check(what, lambda: _share_of_budget(rival, np.load(path)))
    else:
        book.skip(what, "the engine left no logits")
    book.attempt(f"{shape.name}: decode of transformers", partial(_decode, rival))  # last: compiling takes minutes


def _load(bench: Bench, bundle: Path, shape: Shape) -> Any:
    """The model on the device, in the engine's arithmetic."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = bundle.with_name(f"{shape.name}-checkpoint")
    folder.mkdir(exist_ok=True)
    for file in shape.files:
        link = folder / file
        if not link.exists():
            os.symlink(bundle / file, link)
    settings = {key: value for key, value in shape.config.items() if key not in ("model_type", "torch_dtype")}
    (architecture,) = settings["architectures"]
    model_class = getattr(transformers, architecture)
    model_class.config_class(**{**settings, "sliding_window": None}).save_pretrained(folder)
    model = model_class.from_pretrained(
        folder,
        dtype=getattr(bench.torch, shape.arithmetic),
        attn_implementation="sdpa",
        local_files_only=True,
    )
    return model.to(bench.where).eval().requires_grad_(False)


def _finish(bench: Bench) -> None:
    if bench.where == "cuda":
        bench.torch.cuda.synchronize()


def _tell(rival: Rival, what: str, name: str, taken: float, tokens: int, target: float) -> None:
    """Their speed, and ours as a share of it."""
    bench, shape = rival.bench, rival.shape
    speed = tokens / taken
    bench.book.add(Timing(SECTION, f"{shape.name}, {name}", 1e6 * taken, speed, "tok/s"))
    ours = bench.ceiling(figure_name(shape.name, what))
    if ours is None:
        bench.book.skip(f"{shape.name}: {what} beside transformers", "the engine's speed is not known")
        return
    beside = f"{shape.name}, {what} beside transformers"
    bench.book.add(Timing(SECTION, beside, 1e6 * tokens / ours, ours, "tok/s", ours / speed, name, target))


def _prefill(rival: Rival) -> None:
    bench, lengths = rival.bench, lengths_of(rival.bench)
    torch, model = bench.torch, rival.model()
    ids = torch.tensor([random_tokens(rival.shape, lengths.prefill, 2)], device=bench.where)

    def run() -> float:
        _finish(bench)
        begun = time.perf_counter()
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        assert bool(torch.isfinite(logits).all()), "a logit is not finite"  # waits for the device as well
        return time.perf_counter() - begun

    _tell(rival, PREFILL, "transformers' sdpa", timed(run, bench.small), lengths.prefill, PREFILL_TARGET)


def _decode(rival: Rival) -> None:
    bench = rival.bench
    ways = ({"backend": "eager", "fullgraph": True},) if bench.small else _COMPILED
    refused = []
    for way in ways:
        try:
            taken = _decode_seconds(rival, way)
        except Exception as error:
            bench.torch._dynamo.reset()
            refused.append(f"{way}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        bench.book.fact(f"{rival.shape.name}: transformers compiled by", f"{way} {' '.join(refused)}".strip())
        _tell(rival, DECODE, "transformers, static cache and torch.compile", taken, 1, DECODE_TARGET)
        return
    raise RuntimeError(" | ".join(refused))


def _decode_seconds(rival: Rival, way: dict[str, Any]) -> float:
    """Of one greedy token, in the fastest of some rounds; the host waits for the device at the end of a round only."""
    from transformers import StaticCache

    bench, lengths = rival.bench, lengths_of(rival.bench)
    torch, model = bench.torch, rival.model()
    rounds = 1 if bench.small else _ROUNDS
    whole = lengths.prompt + lengths.warm + rounds * lengths.decode
    cache = StaticCache(config=model.config, max_cache_len=whole + 1)
    step = torch.compile(model.forward, **way)
    takes_positions = "cache_position" in inspect.signature(model.forward).parameters

    def call(forward: Callable[..., Any], ids: Any, first: int) -> Any:
        position = torch.arange(first, first + ids.shape[1], device=bench.where)
        more = {"cache_position": position} if takes_positions else {}
        logits = forward(
            input_ids=ids, position_ids=position[None], past_key_values=cache, use_cache=True, logits_to_keep=1, **more
        ).logits
        return logits[:, -1:].argmax(-1)

    with torch.no_grad():
        prompt = torch.tensor([random_tokens(rival.shape, lengths.prompt, 0)], device=bench.where)
        token, position, best = call(model.forward, prompt, 0).clone(), lengths.prompt, math.inf
        for count in (lengths.warm, *[lengths.decode] * rounds):
            _finish(bench)
            begun = time.perf_counter()
            for _ in range(count):
                token = call(step, token, position).clone()
                position += 1
            _finish(bench)
            if count != lengths.warm:
                best = min(best, (time.perf_counter() - begun) / count)
    return best


def _share_of_budget(rival: Rival, own: NDArray[np.float32]) -> float:
    """transformers' float32 is the truth, and what it loses in the engine's arithmetic is the room."""
    from reference.parity import budget

    bench, shape, lengths = rival.bench, rival.shape, lengths_of(rival.bench)
    model = rival.model()
    with _window(model, shape.config["sliding_window"]):
        rounded = _last_logits(bench, model, shape, lengths)
        with _in_float32(model):
            truth = _last_logits(bench, model, shape, lengths)
    allowed = budget([truth], [rounded], shape.arithmetic)
    bench.book.fact(f"{shape.name}: errors of transformers and of the engine against transformers in float32", (
        f"{allowed.reference_error:.4g} and {float(np.abs(own - truth).max()):.4g}; the largest logit is "
        f"{allowed.largest_logit:.4g}"
    ))  # fmt: skip
    return float(np.abs(own - truth).max()) / allowed.allowed


@contextmanager
def _window(model: Any, window: int | None) -> Iterator[None]:
    """Within this block the model's attention slides."""
    before, model.config.sliding_window = model.config.sliding_window, window
    try:
        yield
    finally:
        model.config.sliding_window = before


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Within this block the parameters are float32; buffers always are. They lose nothing on their way back."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before[name])


def _last_logits(bench: Bench, model: Any, shape: Shape, lengths: Lengths) -> NDArray[np.float32]:
    """[compared, V]"""
    torch = bench.torch
    ids = torch.tensor([crossing_text(shape, lengths)], device=bench.where)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=lengths.compared).logits[0]
    array: NDArray[np.float32] = logits.float().cpu().numpy()
    return array
