"""The passes in their order, each with the reason for its place, and the report of what they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graph_passes.canonical import canonicalise
from graph_passes.driver import apply, apply_in_step
from graph_passes.driver_types import FusionRecord, RefusalRecord, Rule
from graph_passes.dump import dump
from graph_passes.fuse import (
    gated_activation,
    gqa,
    linear,
    moe,
    moe_gate,
    rms_norm,
    rolling_attention,
    rolling_kv,
    rope,
    sliding_window,
)
from graph_passes.twin import Twin
from runtime.errors import FusionError

CANONICALISE_REASON = "one spelling for every computation, before anything is matched"
PIPELINE: tuple[tuple[Rule, str], ...] = (
    (rope.RULE, "first, since it needs nothing of the others and takes the most nodes out of their way"),
    (rolling_kv.RULE, "before attention, so that keys and values come from a named ring and not from a scatter"),
    (gqa.RULE, "turns attention into one node with an explicit mask"),
    (sliding_window.RULE, "needs the node that gqa made, and lets the mask die"),
    (moe_gate.RULE, "before the experts, which read its weights and expert numbers"),
    (moe.RULE, "the widest region, once everything in it has its final form"),
    (gated_activation.RULE, "after moe, whose experts hold the same product inside"),
    (rms_norm.RULE, "needs nothing of the others, and no other walks through a norm after this"),
    (rolling_attention.RULE, "takes in what rope, rolling_kv and sliding_window have named"),
    (linear.RULE, "last, since the rules before it recognise products by their standard operators"),
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass: node counts around it and its seconds."""

    name: str
    reason: str
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """What the pipeline did to the template.

    counts: how often each rule fired. refusals: the anchors that did not match, and why.
    """

    passes: tuple[PassRecord, ...]
    fusions: tuple[FusionRecord, ...]
    refusals: tuple[RefusalRecord, ...]
    counts: Mapping[str, int]
    proved: bool

    @property
    def largest_error(self) -> float | None:
        """The largest proof error, None when nothing was proved."""
        return max((f.error for f in self.fusions if f.error is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest; without seconds, so that equal inputs give equal files."""
        passes = [{k: v for k, v in asdict(p).items() if k != "seconds"} for p in self.passes]
        return {
            "proved": self.proved,
            "largest_error": self.largest_error,
            "counts": dict(self.counts),
            "passes": passes,
            "fusions": [asdict(f) for f in self.fusions],
        }


def run(
    model: ir.Model,
    expected: Mapping[str, int],
    *,
    proving: bool = True,
    twin: ir.Model | None = None,
    dump_folder: Path | None = None,
    progress: Progress | None = None,
) -> PipelineReport:
    """Canonicalise and fuse `model` in place.

    expected: how often each rule must fire, by rule name; a rule that is not named must not fire. Too few or too many
    is a FusionError that carries the matchers' reasons. Raises ProofError when a rewrite changes the numbers.
    twin: the same program traced with small sizes, where `model` is too large for proofs; it is rewritten as well.
    """
    pair = None if twin is None else Twin(twin, model)
    passes: list[PassRecord] = []
    fusions: list[FusionRecord] = []
    refusals: list[RefusalRecord] = []
    steps = len(PIPELINE) + 1

    def record(name: str, reason: str, work: Callable[[], None]) -> None:
        before, began = len(model.graph), time.perf_counter()
        work()
        passes.append(PassRecord(name, reason, before, len(model.graph), time.perf_counter() - began))
        if dump_folder is not None:
            dump(model, dump_folder / f"{len(passes):02d}_{name}.onnx")
        if progress is not None:
            progress("fusing", len(passes), steps)

    if dump_folder is not None:
        dump(model, dump_folder / "00_traced.onnx")
    record("canonicalise", CANONICALISE_REASON, lambda: canonicalise(model))
    if twin is not None:
        canonicalise(twin)
    for rule, reason in PIPELINE:

        def fuse(rule: Rule = rule) -> None:
            if pair is None:
                done, refused = apply(model, rule, proving=proving)
            else:
                done, refused = apply_in_step(pair, model, rule, proving=proving)
            _hold_to(rule.name, len(done), expected.get(rule.name, 0), refused)
            fusions.extend(done)
            refusals.extend(refused)

        record(rule.name, reason, fuse)
    counts = {rule.name: sum(f.rule == rule.name for f in fusions) for rule, _ in PIPELINE}
    return PipelineReport(tuple(passes), tuple(fusions), tuple(refusals), counts, proving)


def _hold_to(rule: str, found: int, expected: int, refused: list[RefusalRecord]) -> None:
    """Raises FusionError with the refusal that came nearest to a match first, and the others after it."""
    if found == expected:
        return
    by_nearness = sorted(refused, key=lambda record: record.distance, reverse=True)
    shown = f"The nearest match: {by_nearness[0]}." if refused else "No node looked like its beginning."
    if others := by_nearness[1:4]:
        shown += " Others: " + "; ".join(str(record) for record in others) + "."
    raise FusionError(
        f"The fusion {rule!r} fired {found} times in the traced template where {expected} are due. {shown} "
        "An unfused graph would be slow or, past the window, wrong, so nothing was written. Pass --dump-passes DIR to "
        "see the graph before and after each pass."
    )
