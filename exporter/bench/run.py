"""The way through: load, warm up, measure in rounds, read the memory, load again, count the graph, profile.

Letters: B batch rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from exporter.bench.contexts import READ_AGAIN, plan_contexts, position_limit
from exporter.bench.graph_cost import graph_cost, require_packages
from exporter.bench.limits import MachineLimits
from exporter.bench.profile import profiles
from exporter.bench.report import AtContext, BenchReport, LeftOut, Memory, Profile, Spread
from exporter.bench.rounds import Rounds, Text, warm_up
from exporter.bench.shares import decode_of, limits_of, prefill_of, step_cost
from exporter.machine import describe, memory_of, seconds
from runtime import Bundle, Session, load
from runtime.backends.cores import physical_cores
from runtime.errors import InputError
from runtime.kernels import kernels, why_none
from runtime.manifest import Manifest
from runtime.parity_proof import open_bundle

LOADING, PROFILING = "loading", "profiling"
"""Stages whose end nobody knows; MEASURING of `exporter.bench.rounds` counts tokens."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure, and how often.

    contexts: see `exporter.bench.contexts.plan_contexts`. prompt: tokens before the first new one. decode_tokens: of a
    group. batch: rows. profile: also where the time goes. The rest: see `runtime.load`.
    """

    contexts: str | None = None
    prompt: int = 512
    rounds: int = 3
    decode_tokens: int = 48
    batch: int = 1
    profile: bool = False
    threads: int | None = None
    backend: str | None = None
    engine: str | None = None
    weights_folder: Path | None = None
    verify: bool = False
    require_parity: bool | str = False
    trust: Path | None = None


def bench(path: str | Path, options: BenchOptions, progress: Progress | None = None) -> BenchReport:
    """Measure the bundle in a folder.

    progress: called with (stage, done, total): bytes while hashes are compared, and tokens while speed is measured.
    Raises what `runtime.load` raises, InputError for contexts or a batch that the bundle cannot take, and
    ModuleNotFoundError in an install without the packages that read graphs.
    """
    require_packages()
    bundle = open_bundle(
        path,
        options.require_parity,
        options.trust,
        options.backend,
        options.engine,
        verify=options.verify,
        weights_folder=options.weights_folder,
        progress=progress,
    )
    manifest = bundle.manifest
    plan = plan_contexts(options.contexts, manifest.kv, decode_tokens=options.decode_tokens, rounds=options.rounds)
    if options.batch > manifest.kv.max_batch:
        raise InputError(
            f"The bundle was exported for at most {manifest.kv.max_batch} rows, so {options.batch} cannot be measured. "
            f"Ask for fewer, or export the checkpoint again with --max-batch {options.batch}."
        )
    opened = partial(
        load,
        path,
        backend=options.backend,
        engine=_engine(bundle, options),
        threads=options.threads,
        weights_folder=options.weights_folder,
    )
    threads = physical_cores() if options.threads is None else options.threads
    text = Text(manifest.model.vocab_size, options.batch)
    prompt, left_out = _prompt(options.prompt, position_limit(manifest.kv))

    stage = progress if progress is not None else _unseen
    stage(LOADING, 0, 0)
    before = memory_of()
    holder: list[Session] = []
    loading = [seconds(lambda: holder.append(opened()))]
    session = holder.pop()
    loaded = memory_of()
    warm_up(session, text)
    ready = memory_of()
    with MachineLimits(threads) as limits:
        rounds = Rounds(
            session, text, plan,
            rounds=options.rounds, prompt=prompt, decode_tokens=options.decode_tokens, progress=progress,
        )  # fmt: skip
        samples = rounds.measure(limits.measure)
    end = memory_of()
    memory = Memory(
        before=before.get("VmRSS"),
        loaded=loaded.get("VmRSS"),
        ready=ready.get("VmRSS"),
        end=end.get("VmRSS"),
        anonymous=end.get("RssAnon"),
        peak=end.get("VmHWM"),
        kv_bytes=session.kv_bytes,
    )
    notes, native = session.notes, session.kernels
    del session, rounds
    stage(LOADING, 0, 0)
    # Not before: what a session leaves behind would count as the next one's memory.
    loading += [seconds(opened) for _ in range(options.rounds - 1)]

    found = kernels()
    cost = graph_cost(bundle, native)
    measured = limits_of(samples.rates)
    longest = max(samples.counted, default=max(samples.steps))
    step = step_cost(cost, samples.counted.get(longest, {}), batch=options.batch)
    contexts = tuple(
        AtContext(
            context,
            prefill_of(samples.reading[context], cost, measured, batch=options.batch),
            decode_of(groups, step.weight_bytes, measured, batch=options.batch),
        )
        for context, groups in sorted(samples.steps.items())
    )
    first = [(options.prompt, elapsed) for elapsed in samples.first]
    profile: dict[str, Profile] = {}
    if options.profile:
        stage(PROFILING, 0, 0)
        profile = profiles(
            lambda folder: opened(profile=folder),
            text,
            cost,
            context=_profiled(manifest, list(samples.steps)),
            decode_tokens=options.decode_tokens,
            batch=options.batch,
        )
    return BenchReport(
        bundle=str(bundle.path),
        model=_model(manifest),
        machine=describe(),
        kernels={"isa": None if found is None else found.isa, "ops": native, "reason": why_none()},
        options={
            "threads": threads,
            "batch": options.batch,
            "rounds": options.rounds,
            "decode_tokens": options.decode_tokens,
            "prompt": options.prompt,
            "contexts": options.contexts,
            "once_beyond": READ_AGAIN,
        },
        limits=measured,
        load_seconds=Spread.of(loading),
        memory=memory,
        step=step,
        first_token=prefill_of(first, cost, measured, batch=options.batch) if first else None,
        contexts=contexts,
        left_out=(*left_out, *plan.left_out, *samples.left_out),
        profile=profile,
        notes=notes,
    )


def _engine(bundle: Bundle, options: BenchOptions) -> str | None:
    """Which engine to load, so that it is the one that was proved where a proof was asked for."""
    if options.engine is not None or options.require_parity is False or not bundle.manifest.engines:
        return options.engine
    if len(bundle.manifest.engines) > 1:
        raise InputError(
            f"Several engines of the bundle {bundle.path} are proved: {', '.join(sorted(bundle.manifest.engines))}. "
            "Name the one to measure with --engine."
        )
    return next(iter(bundle.manifest.engines))


def _unseen(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _prompt(wanted: int, limit: int) -> tuple[int | None, tuple[LeftOut, ...]]:
    """The prompt, if one more token fits behind it."""
    if wanted < limit:
        return wanted, ()
    reason = (
        f"A prompt of {wanted:,} tokens leaves no room for another in {limit:,} positions. Choose a shorter one with "
        "--prompt."
    )
    return None, (LeftOut("first token", reason),)


def _profiled(manifest: Manifest, contexts: list[int]) -> int:
    """The context to profile at: where every window is full, and else the middle one."""
    windows = [layer.window for layer in manifest.kv.layers if layer.window is not None]
    full = [context for context in sorted(contexts) if context >= max(windows, default=0)]
    return full[0] if windows and full else sorted(contexts)[len(contexts) // 2]


def _model(manifest: Manifest) -> dict[str, Any]:
    model, kv = manifest.model, manifest.kv
    return {
        "architecture": model.architecture,
        "parameters": model.parameters,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "windows": [layer.window for layer in kv.layers],
        "weights": manifest.weights.kind,
        "kv_dtype": kv.dtype,
        "chunk": kv.chunk,
        "cierzo_version": manifest.cierzo_version,
    }
