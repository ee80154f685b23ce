"""The golden graph of a bundle, and the graph after each pass: rebuilt from the checkpoint by this version.

Golden is the template traced, canonicalised and not fused, stitched to all layers. Every pass after it gives a stage,
and so does the lowering, with the same names for the values that survive, so that any two stages can be compared value
by value. Where the bundle stores keys and values in fewer bits, stages that come before that do it around their rings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporter.bisect.rings import store_rings
from exporter.frontends import REFERENCE, open_frontend
from exporter.frontends import trace as trace_template
from exporter.plan import ExportPlan, make_plan
from exporter.reopen import recorded_options
from exporter.stitch import stitch
from graph_passes import pipeline
from graph_passes.canonical import canonicalise
from graph_passes.driver import apply, apply_in_step
from graph_passes.lower.formats import LinearFormat
from graph_passes.lower.kv import lower_kv
from graph_passes.lower.linears import lower_linears
from graph_passes.lower.rounding import allow_rounding
from graph_passes.region import IR_VERSION
from graph_passes.twin import Twin
from reference.checkpoint import Checkpoint
from reference.torch_state import plain_torch
from runtime.bundle import Bundle
from runtime.errors import BundleError, TraceError

LOWER_WEIGHTS, LOWER_KV = "lower_linears", "lower_kv"
"""Names of the stages that lowering makes."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The graph after one pass, weights unbound; `name` is the pass's."""

    name: str
    model: ir.Model


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What this version makes of the checkpoint.

    raw: the template as traced, one layer of each kind. early: the template in canonical form, and after each pass up
        to golden's.
    stages: the stitched graphs, golden first and the finished one last. Golden is the canonical graph before any
        fusion, or the earliest after it whose layers hang together by one hidden state, as stitching needs.
    """

    plan: ExportPlan
    raw: ir.Model
    early: tuple[Stage, ...]
    stages: tuple[Stage, ...]

    @property
    def golden(self) -> ir.Model:
        """The graph that all others are held against."""
        return self.stages[0].model


def plan_of(bundle: Bundle, checkpoint: Checkpoint) -> ExportPlan:
    """The plan by which the bundle must have been made. Raises BundleError when its rings have other sizes."""
    kv = bundle.manifest.kv
    plan = make_plan(checkpoint.config, chunk=kv.chunk, max_batch=kv.max_batch, context=kv.context, kv=kv.dtype)
    for layer, (kind, held) in enumerate(zip(plan.kind_of_layer, kv.layers, strict=True)):
        if plan.capacity(kind) != held.capacity:
            raise BundleError(
                f"The ring of layer {layer} has {held.capacity} slots in the bundle and {plan.capacity(kind)} by the "
                "checkpoint's windows, so no graph made from the checkpoint can take the bundle's rings. The fault is "
                "in the manifest: export the checkpoint again."
            )
    return plan


@plain_torch()
def rebuild(
    bundle: Bundle, checkpoint: Checkpoint, plan: ExportPlan, formats: Mapping[str, LinearFormat] | None = None
) -> Rebuilt:
    """Trace, canonicalise, fuse and lower again, with proofs off; the front end is the one that the bundle records.

    formats: how the bundle's graph reads each matrix; None is float32. What is too large to be run is matched on its
    twin here too, since a matcher tries its readings by running them.
    """
    options = recorded_options(bundle.manifest)
    frontend = open_frontend(
        str(options.get("frontend", REFERENCE.name)),
        options.get("attention"),
        checkpoint,
        options.get("ignore_config_keys", ()),
    )
    template = trace_template(plan, frontend)
    pair = None if plan.twin is None else Twin(trace_template(plan.twin, frontend), template)
    raw = template.clone()
    early: list[Stage] = []
    stages: list[Stage] = []

    def keep(name: str, *, last: bool) -> None:
        if not stages:
            early.append(Stage(name, template.clone()))
        try:
            stages.append(Stage(name, _whole(template, plan)))
        except TraceError:
            if stages or last:
                raise

    for model in (template,) if pair is None else (template, pair.small):
        canonicalise(model)
    keep("canonicalise", last=False)
    for rule, _ in pipeline.PIPELINE:
        if pair is None:
            apply(template, rule, proving=False)
        else:
            apply_in_step(pair, template, rule, proving=False)
        keep(rule.name, last=rule is pipeline.PIPELINE[-1][0])
    lowered = stages[-1].model.clone()
    lower_linears(lowered, formats or {})
    stages.append(Stage(LOWER_WEIGHTS, lowered))
    for stage in stages:
        store_rings(stage.model, plan.kv)
    # The finished graph has such rings of its own.
    finished = _whole(template, plan)
    lower_linears(finished, formats or {})
    lower_kv(finished, plan.kv)
    if bundle.manifest.weights.quantization is not None:
        allow_rounding(finished)
    stages.append(Stage(LOWER_KV, finished))
    return Rebuilt(plan, raw, tuple(early), tuple(stages))


def _whole(template: ir.Model, plan: ExportPlan) -> ir.Model:
    model = stitch(template, plan)
    model.ir_version = IR_VERSION
    return model
