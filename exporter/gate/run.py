"""One validation: plan, truth, checks, report.

The reference reads whole rows in float64, one layer in memory at a time, and knows nothing of rings; the engine gets
the same tokens in all the ways in which tokens come.
"""

from __future__ import annotations

import functools
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from exporter.gate.checks_batches import ragged_batch
from exporter.gate.checks_bodies import portable_bodies
from exporter.gate.checks_memory import declared_windows, memory
from exporter.gate.checks_prompts import (
    highest,
    last_tokens,
    one_at_a_time,
    uneven_pieces,
    whole_prompts,
)
from exporter.gate.checks_reach import long_roll, receptive_field, undecided_routers
from exporter.gate.checks_state import reset, sampling, threads
from exporter.gate.checks_weights import quantized_weights
from exporter.gate.feeding import Logits, Run, logits_at
from exporter.gate.plan import make_plan
from exporter.gate.truth import TruthRow, make_truth
from exporter.machine import installed
from exporter.quality import divergence, measure_quality, quality_check, read_text
from exporter.quantized_reference import of_engine, quantized_reference
from exporter.reopen import reopen
from exporter.validation_report import SUITES, Check, Distributions, Speed, ValidationReport
from reference.checkpoint import Checkpoint
from reference.oracle import Oracle
from reference.parity import position_errors
from runtime import load
from runtime.backends import DEFAULT_BACKEND
from runtime.errors import CheckpointError, InputError
from runtime.session import Session

Progress = Callable[[str, int, int], None]
Step = Callable[[Run], Iterator[Check]]

CHECKING = "checking the engine"
"""The stage of the checks, in checks."""


def validate(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    *,
    suite: str = SUITES[0],
    backend: str | None = None,
    engine: str | None = None,
    seed: int = 0,
    verify: bool = False,
    weights_folder: Path | None = None,
    text: str | Path | None = None,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Compare the engine of `bundle` with the reference model of `checkpoint` (default: the one it was made from).

    suite: "full", or "quick" for what fits into a minute on a model of a billion parameters.
    engine, verify, weights_folder: see `runtime.load`.
    text, max_kl: for quantised weights, a file with the text on which they are compared with the original ones
        (default: what the engine itself writes), and how far they may be from them; see `exporter.quality`.

    A quantised engine is held twice: against the reference with its quantised weights as numbers, and, for quality,
    against the original.

    Parity that fails is a report with `passed` False. Raises BundleError, CheckpointError and BackendError when the
    comparison cannot be run at all, for instance because the two are not even the same model; InputError for an unknown
    suite, a negative seed, a text that cannot be read, and for `text` and `max_kl` where no weights are quantised.
    """
    if suite not in SUITES:
        raise InputError(f"There is no suite {suite!r}. Available: {', '.join(SUITES)}.")
    if seed < 0:
        raise InputError(f"A seed is a whole number from 0 on, not {seed}.")
    begun = time.perf_counter()
    session = load(
        bundle, backend=backend, engine=engine, verify=verify, weights_folder=weights_folder, progress=progress
    )
    opened = open_matching(session, checkpoint)
    quantized = quantized_reference(session.bundle)
    if not quantized.weights and (text is not None or max_kl is not None):
        raise InputError(
            "A text and a largest divergence (--text, --max-kl) are for quantised weights: this bundle's are the "
            "checkpoint's own, so that nothing is lost that a text could show. Leave the options out."
        )
    if text is not None:
        read_text(session, text)  # before the other checks take their time
    rng = np.random.default_rng(seed)
    windows = opened.config.layer_windows
    plan = make_plan(session, windows, session.manifest.model.parameters, suite, rng)
    oracle = Oracle(opened, quantized.weights)
    rounding, dtype = of_engine(session.numerics, quantized.rounding)
    truth_of = functools.partial(
        make_truth,
        oracle,
        moe=opened.config.moe,
        arithmetic=session.numerics.arithmetic,
        rounding=rounding,
        dtype=dtype,
        progress=progress,
    )
    truth = truth_of(plan.rows, plan.wanted)
    run = Run(session, plan, truth, windows, opened.config.moe is not None, truth_of, rng)
    steps: list[Step] = [
        whole_prompts, uneven_pieces, last_tokens, highest, one_at_a_time, ragged_batch, reset,
        functools.partial(threads, backend=backend, weights_folder=weights_folder), sampling, receptive_field,
        long_roll, undecided_routers, declared_windows, portable_bodies, memory,
    ]  # fmt: skip
    checks = _run(run, steps, progress)
    quality = None
    if quantized.weights:
        original = Oracle(opened)
        checks.append(quantized_weights(quantized.weights, original, progress))
        quality = measure_quality(session, original, text=text, seed=seed, progress=progress)
        checks.append(quality_check(quality, session.manifest.weights.kind, max_kl))
    row = run.first
    session.reset()
    logits = logits_at(session, row.tokens, row.positions)
    return ValidationReport(
        bundle=str(bundle),
        checkpoint=str(opened.path),
        backend=backend or DEFAULT_BACKEND,
        engine=session.engine_name,
        device=session.device,
        suite=suite,
        dtype=dtype,
        seed=seed,
        budget=truth.budget.allowed,
        reference_error=truth.budget.reference_error,
        largest_logit=truth.budget.largest_logit,
        reason=truth.budget.tolerance.reason,
        checks=tuple(checks),
        positions=tuple(row.positions.tolist()),
        position_errors=tuple(position_errors(row.logits_RV, logits).tolist()),
        position_budgets=tuple(row.allowed_R.tolist()),
        distributions=_distributions(row, logits),
        quality=quality,
        unverified=session.unverified,
        versions=installed("cierzo", "torch", "onnxruntime", "onnxruntime-gpu", "numpy"),
        windows=windows,
        chunk=session.manifest.kv.chunk,
        seconds=time.perf_counter() - begun,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        speed=_speed(run),
    )


def _run(run: Run, steps: list[Step], progress: Progress | None) -> list[Check]:
    checks: list[Check] = []
    for number, step in enumerate(steps, start=1):
        begun = time.perf_counter()
        for check in step(run):
            now = time.perf_counter()
            checks.append(replace(check, seconds=now - begun))
            begun = now
        if progress is not None:
            progress(CHECKING, number, len(steps))
    return checks


def _speed(run: Run) -> Speed:
    """Medians; of prompts only those of a whole chunk or more, since shorter ones say little."""
    chunk = run.session.manifest.kv.chunk
    prefill = [tokens / seconds for tokens, seconds in run.timings.get("prefill", []) if tokens >= chunk]
    decode = [tokens / seconds for tokens, seconds in run.timings.get("decode", [])]
    return Speed(*(statistics.median(found) if found else None for found in (prefill, decode)))


def _distributions(row: TruthRow, logits_RV: Logits) -> Distributions:
    truth = row.logits_RV
    best = np.sort(np.partition(truth, -2, axis=-1)[:, -2:], axis=-1)
    finite = np.isfinite(logits_RV).all(axis=-1)
    kl = np.full(len(truth), np.inf)
    if finite.any():
        kl[finite] = divergence(truth[finite], logits_RV[finite])
    return Distributions(
        kl=tuple(kl.tolist()),
        same_best=tuple((truth.argmax(axis=-1) == logits_RV.argmax(axis=-1)).tolist()),
        margin=tuple((best[:, 1] - best[:, 0]).tolist()),
    )


def open_matching(session: Session, checkpoint: str | Path | None) -> Checkpoint:
    """The checkpoint to compare with; refuses one of another shape."""
    recorded = session.manifest.provenance.get("checkpoint")
    path = checkpoint if checkpoint is not None else recorded
    if path is None or (checkpoint is None and not os.path.isdir(str(path))):
        raise CheckpointError(
            f"The bundle was made from {recorded}, which is not there. Name the checkpoint "
            "as the second argument, after the bundle."
        )
    opened = reopen(session.manifest, str(path))
    model, config = session.manifest.model, opened.config
    for name in ("architecture", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
        ours, theirs = getattr(model, name), getattr(config, name)
        if ours != theirs:
            raise CheckpointError(
                f"The bundle has {name} = {ours} and the checkpoint {path} has {theirs}: they are not the same model, "
                "so there is nothing to compare. Name the checkpoint that the bundle was made from."
            )
    limit = session.manifest.kv.position_limit
    if limit != config.position_limit:
        ours, theirs = ("any length" if end is None else f"{end:,} tokens" for end in (limit, config.position_limit))
        raise CheckpointError(
            f"The bundle's manifest lets a text have {ours}, and the checkpoint {path} is one function of its tokens "
            f"for {theirs}. Export the checkpoint again, or name the one that the bundle was made from."
        )
    return opened
