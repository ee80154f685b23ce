"""Holds a bundle's engine against the reference on the borders where engines go wrong.

One row of random tokens is long enough for every border; attention is causal, so the truth of a shorter prompt is the
beginning of the truth of the longer one. The reference reads whole rows in float64 and knows nothing of rings; the
engine gets the same tokens as prompts of boundary lengths, in uneven pieces, one at a time, and as generation does,
with logits of last tokens only.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporter.borders import boundary_lengths, last_position
from exporter.quality import measure_quality, quality_check, read_text
from exporter.quantized_reference import of_engine, quantized_reference
from exporter.reopen import reopen
from exporter.validation_report import Check, ValidationReport, render
from reference.checkpoint import Checkpoint
from reference.parity import Budget, budget, position_errors
from runtime import load
from runtime.backends import DEFAULT_BACKEND
from runtime.errors import CheckpointError, InputError
from runtime.rolling_kv import kv_bytes
from runtime.session import Session

__all__ = ["ValidationReport", "render", "validate"]

LONGEST_PROBE = 8192
"""A receptive field beyond this many tokens is not probed: the row would have to be longer still."""

_ONE_AT_A_TIME = 96
"""Tokens that are fed singly at most, at the end of the row, where every ring has wrapped."""

Progress = Callable[[str, int, int], None]
Row = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class _Run:
    """What all checks of one validation share. `windows` are the checkpoint's, by layer: the bundle may be wrong."""

    session: Session
    windows: tuple[int | None, ...]
    rows: tuple[Row, ...]
    truth: tuple[Logits, ...]
    budget: Budget
    rng: np.random.Generator


def validate(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    *,
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

    engine, verify, weights_folder: see `runtime.load`.
    text, max_kl: for quantised weights, a file with the text on which they are compared with the original ones
        (default: what the engine itself writes), and how far they may be from them; see `exporter.quality`.

    A quantised engine is held twice: against the reference with its quantised weights as numbers, and, for quality,
    against the original.

    Parity that fails is a report with `passed` False. Raises BundleError, CheckpointError and BackendError when the
    comparison cannot be run at all, for instance because the two are not even the same model; InputError for a text
    that cannot be read, and for `text` and `max_kl` where no weights are quantised.
    """
    import torch

    from reference.oracle import Oracle

    session = load(
        bundle, backend=backend, engine=engine, verify=verify, weights_folder=weights_folder, progress=progress
    )
    opened = open_matching(session, checkpoint)
    rng = np.random.default_rng(seed)
    windows = opened.config.layer_windows
    rows = _rows(boundary_lengths(session, windows)[-1], opened.config.vocab_size, rng)
    quantized = quantized_reference(session.bundle)
    if not quantized.weights and (text is not None or max_kl is not None):
        raise InputError(
            "A text and a largest divergence (--text, --max-kl) are for quantised weights: this bundle's are the "
            "checkpoint's own, so that nothing is lost that a text could show. Leave the options out."
        )
    if text is not None:
        read_text(session, text)  # before the other checks take their time
    oracle = Oracle(opened, quantized.weights)
    tokens = [row.tolist() for row in rows]
    truth = tuple(t.numpy() for t in oracle.logits(tokens, torch.float64, progress))
    rounding, dtype = of_engine(session.numerics, quantized.rounding)
    arithmetic = getattr(torch, session.numerics.arithmetic)
    own = tuple(t.float().numpy() for t in oracle.logits(tokens, arithmetic, progress, rounding=rounding))
    run = _Run(session, windows, rows, truth, budget(truth, own, dtype), rng)
    checks: list[Check] = []
    steps = (
        _whole_prompts, _uneven_pieces, _last_tokens, _highest, _one_at_a_time, _ragged_batch, _reset, _receptive_field,
        _memory,
    )  # fmt: skip
    for number, step in enumerate(steps, start=1):
        checks.extend(step(run))
        if progress is not None:
            progress("checking the engine", number, len(steps))
    quality = None
    if quantized.weights:
        quality = measure_quality(session, Oracle(opened), text=text, seed=seed, progress=progress)
        checks.append(quality_check(quality, session.manifest.weights.kind, max_kl))
    session.reset()
    errors = position_errors(truth[0], session.forward(rows[0])[0])
    return ValidationReport(
        bundle=str(bundle),
        checkpoint=str(opened.path),
        backend=backend or DEFAULT_BACKEND,
        dtype=dtype,
        seed=seed,
        budget=run.budget.allowed,
        reference_error=run.budget.reference_error,
        largest_logit=run.budget.largest_logit,
        reason=run.budget.tolerance.reason,
        checks=tuple(checks),
        position_errors=tuple(errors.tolist()),
        quality=quality,
        unverified=session.unverified,
        versions={name: importlib.metadata.version(name) for name in ("torch", "onnxruntime", "numpy")},
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
    return opened


def _rows(longest: int, vocabulary: int, rng: np.random.Generator) -> tuple[Row, ...]:
    """A row of the longest border's length, and two shorter ones for the ragged batch."""
    sizes = (longest, max(1, longest // 2 + 1), max(1, longest // 5))
    return tuple(rng.integers(0, vocabulary, size, dtype=np.int64) for size in sizes)


def _compare(run: _Run, name: str, got: Logits, want: Logits, detail: str, positions: Row | None = None) -> Check:
    """positions: of the rows of logits that are compared, None for 0, 1, 2, …"""
    errors = position_errors(want, got)
    worst = float(errors.max())
    if worst <= run.budget.allowed:
        return Check(name, True, detail, worst)
    first = int(np.argmax(errors > run.budget.allowed))
    first = first if positions is None else int(positions[first])
    return Check(name, False, f"{detail}; over budget first at position {first}", worst)


def _whole_prompts(run: _Run) -> Iterator[Check]:
    for length in boundary_lengths(run.session, run.windows):
        run.session.reset()
        got = run.session.forward(run.rows[0][:length])[0]
        yield _compare(run, f"prompt of {length}", got, run.truth[0][:length], "whole prompt, all positions")


def _uneven_pieces(run: _Run) -> Iterator[Check]:
    chunk = run.session.manifest.kv.chunk
    row = run.rows[0]
    run.session.reset()
    pieces, at = [], 0
    while at < len(row):
        size = int(run.rng.choice([1, 2, max(1, chunk - 1), chunk, chunk + 1, int(run.rng.integers(1, 2 * chunk + 2))]))
        pieces.append(run.session.forward(row[at : at + size])[0])
        at += size
    got = np.concatenate(pieces)
    yield _compare(run, "uneven pieces", got, run.truth[0], f"{len(pieces)} feeds of random sizes around {chunk}")


def _last_tokens(run: _Run) -> Iterator[Check]:
    """The row cut at every border; the head sees the last token of each piece, and in most steps none."""
    run.session.reset()
    ends = np.array(boundary_lengths(run.session, run.windows))
    got = np.concatenate(
        [run.session.forward_last(run.rows[0][first:end]) for first, end in zip([0, *ends], ends, strict=False)]
    )
    detail = f"the last token's logits of {len(ends)} feeds that end at the borders"
    yield _compare(run, "last tokens", got, run.truth[0][ends - 1], detail, ends - 1)


def _highest(run: _Run) -> Iterator[Check]:
    """Engines that choose among logits themselves: what they give out, against all logits of the same engine."""
    most = run.session.most_top
    if most:
        run.session.reset()
        logits_V = run.session.forward_last(run.rows[0])[0]
        run.session.reset()
        (found,) = run.session.forward_candidates(run.rows[0], most, lambda _: True)
        due = np.sort(np.argsort(-logits_V, kind="stable")[:most])
        assert found is not None
        assert found.ids_N is not None
        same = bool(np.array_equal(found.ids_N, due) and np.array_equal(found.logits_N, logits_V[due]))
        detail = f"the {most} that the engine gives {'are' if same else 'are not'} the highest of all"
        yield Check("highest logits", same, detail)


def _one_at_a_time(run: _Run) -> Iterator[Check]:
    row = run.rows[0]
    first = max(0, len(row) - _ONE_AT_A_TIME)
    run.session.reset()
    if first:
        run.session.forward_last(row[:first])
    got = np.concatenate([run.session.forward(row[at : at + 1])[0] for at in range(first, len(row))])
    yield _compare(run, "one at a time", got, run.truth[0][first:], f"the last {len(row) - first} tokens singly")


def _ragged_batch(run: _Run) -> Iterator[Check]:
    name, count = "ragged batch", len(run.rows)
    if run.session.manifest.kv.max_batch < count:
        yield Check(name, None, f"the bundle was exported for {run.session.manifest.kv.max_batch} rows")
        return
    run.session.reset()
    cut = [len(row) // 3 for row in run.rows]
    cut[0] = max(1, cut[0])
    heads = [row[: max(1, at)] for row, at in zip(run.rows, cut, strict=True)]
    tails = [row[len(head) :] for row, head in zip(run.rows, heads, strict=True)]
    first = run.session.forward([head.tolist() for head in heads])
    second = run.session.forward([tail.tolist() for tail in tails]) if any(len(tail) for tail in tails) else None
    for index, (head, tail, truth) in enumerate(zip(heads, tails, run.truth, strict=True)):
        got = first[index, : len(head)]
        if second is not None:
            got = np.concatenate([got, second[index, : len(tail)]])
        yield _compare(run, f"{name}, row {index}", got, truth, f"{len(truth)} tokens beside rows of other lengths")
    run.session.reset()
    run.session.forward_last(run.rows[0][:1])  # back to one row


def _reset(run: _Run) -> Iterator[Check]:
    row = run.rows[0]
    run.session.reset()
    before = run.session.forward(row)
    run.session.reset()
    same = bool(np.array_equal(before, run.session.forward(row)))
    yield Check("reset", same, f"the same tokens after a reset give {'the same' if same else 'other'} bits")


def _receptive_field(run: _Run) -> Iterator[Check]:
    """One token is changed: logits beyond its reach keep every bit, and the last ones within it move."""
    kv, vocabulary = run.session.manifest.kv, run.session.manifest.model.vocab_size
    windows = [window for window in run.windows if window is not None]
    reach = sum(window - 1 for window in windows) if len(windows) == len(run.windows) else None
    length = (reach if reach is not None else len(run.rows[0])) + kv.chunk + 2
    end = last_position(run.session)
    if end is not None:
        length = min(length, end)
    if length > LONGEST_PROBE:
        yield Check(
            "receptive field", None, f"the row would need {length:,} tokens; {LONGEST_PROBE:,} are probed at most"
        )
        return
    at = min(kv.chunk // 2, length - 1) if reach is not None else length // 2
    row = run.rng.integers(0, vocabulary, length, dtype=np.int64)
    other = row.copy()
    other[at] = (other[at] + 1) % vocabulary
    run.session.reset()
    a = run.session.forward(row)[0]
    run.session.reset()
    b = run.session.forward(other)[0]
    moved = (a != b).any(axis=-1)
    past = not moved[:at].any()
    yield Check("causality", past, f"changing token {at} moves {'no bit' if past else 'logits'} before it")
    if reach is None:
        return
    beyond = np.flatnonzero(moved[at + reach + 1 :])
    if at + reach + 1 >= length:
        yield Check("receptive field", None, f"a row ends at {end} tokens, before anything is out of reach")
    elif len(beyond):
        distance = int(beyond[-1]) + reach + 1
        yield Check("receptive field", False, f"a token {distance} away moved a logit; {reach} is as far as one may")
    else:
        yield Check("receptive field", True, f"a token more than L·(W − 1) = {reach} away moves no bit")
    farthest = int(np.flatnonzero(moved)[-1]) - at if moved.any() else 0
    inside = min(windows) - 1  # within one layer's own window a change cannot fade into rounding
    seen = bool(moved[at : at + inside + 1].all())
    yield Check(
        "window is used",
        seen,
        f"a token up to {inside} away moves the logits; the farthest that did was {farthest} away"
        if seen
        else f"a token at most {inside} away moved nothing",
    )


def _memory(run: _Run) -> Iterator[Check]:
    model, kv = run.session.manifest.model, run.session.manifest.kv
    slots = sum((kv.context or 0) if window is None else window + kv.chunk - 1 for window in run.windows)
    numerics = run.session.numerics
    due = numerics.rings * kv_bytes(
        [slots], batch=run.session.batch, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=numerics.kv
    )
    held = run.session.kv_bytes
    detail = f"{held:,} bytes after {int(run.session.position.max()):,} tokens, as W + C − 1 slots a layer make"
    yield Check("KV memory", held == due, detail if held == due else f"{held:,} bytes are held and {due:,} are due")
