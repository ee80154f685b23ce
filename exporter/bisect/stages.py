"""The golden graph of a bundle, and the graph after each pass: rebuilt from the checkpoint by this version.

Golden is the template traced, canonicalised and not fused, stitched to all layers. Every pass after it gives a stage,
with the same names for the values that survive, so that any two stages can be compared value by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from exporter.frontends import REFERENCE, open_frontend
from exporter.frontends import trace as trace_template
from exporter.plan import ExportPlan, make_plan
from exporter.recipes import first_readers, graft, parameters, value_of
from exporter.reopen import recorded_options
from exporter.stitch import stitch
from graph_passes import pipeline
from graph_passes.canonical import canonicalise
from graph_passes.driver import apply, apply_in_step
from graph_passes.region import IR_VERSION
from graph_passes.twin import Twin
from graph_passes.unbound import is_unbound
from reference.checkpoint import Checkpoint
from reference.torch_state import plain_torch
from reference.weights import WeightSource, bind, load_parameter
from runtime.bundle import Bundle
from runtime.errors import BundleError, TraceError

_COMPARED_AT_ONCE = 1 << 22


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
    plan = make_plan(checkpoint.config, chunk=kv.chunk, max_batch=kv.max_batch, context=kv.context)
    for layer, (kind, held) in enumerate(zip(plan.kind_of_layer, kv.layers, strict=True)):
        if plan.capacity(kind) != held.capacity:
            raise BundleError(
                f"The ring of layer {layer} has {held.capacity} slots in the bundle and {plan.capacity(kind)} by the "
                "checkpoint's windows, so no graph made from the checkpoint can take the bundle's rings. The fault is "
                "in the manifest: export the checkpoint again."
            )
    return plan


@plain_torch()
def rebuild(bundle: Bundle, checkpoint: Checkpoint, plan: ExportPlan) -> Rebuilt:
    """Trace, canonicalise and fuse again, with proofs off; the front end is the one that the bundle records.

    What is too large to be run is matched on its twin here too, since a matcher tries its readings by running them.
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
    return Rebuilt(plan, raw, tuple(early), tuple(stages))


def _whole(template: ir.Model, plan: ExportPlan) -> ir.Model:
    model = stitch(template, plan)
    model.ir_version = IR_VERSION
    return model


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """A parameter of the bundle that is not the checkpoint's.

    elements: how many differ; largest: by how much at most; first: index of the first in the flattened parameter.
    """

    parameter: str
    elements: int
    total: int
    largest: float
    first: int


def differing_weights(bundle: ir.Model, checkpoint: Checkpoint) -> dict[str, WeightDifference]:
    """The parameters that differ from the checkpoint's in any bit of float32, by name; nothing large is held."""
    found: dict[str, WeightDifference] = {}
    held = parameters(bundle)
    for name, source in bind(checkpoint).items():
        if name not in held:
            continue
        difference = _difference(name, value_of(held[name]), checkpoint, source)
        if difference is not None:
            found[name] = difference
    return found


def _difference(
    name: str, held: npt.NDArray[Any], checkpoint: Checkpoint, source: WeightSource
) -> WeightDifference | None:
    want = load_parameter(checkpoint, source, torch.float32).numpy().reshape(-1)
    got = held.reshape(-1)
    if want.shape != got.shape:
        return WeightDifference(name, max(want.size, got.size), want.size, float("inf"), 0)
    elements, largest, first = 0, 0.0, -1
    for begin in range(0, want.size, _COMPARED_AT_ONCE):
        a, b = want[begin : begin + _COMPARED_AT_ONCE], got[begin : begin + _COMPARED_AT_ONCE]
        off = np.flatnonzero(a.view(np.uint32) != b.view(np.uint32))
        if len(off):
            gap = float(np.abs(a[off].astype(np.float64) - b[off].astype(np.float64)).max())
            gap = gap if np.isfinite(gap) else float("inf")
            first = begin + int(off[0]) if first < 0 else first
            elements, largest = elements + len(off), max(largest, gap)
    return None if elements == 0 else WeightDifference(name, elements, want.size, largest, first)


def bound(model: ir.Model, bundle: ir.Model, checkpoint: Checkpoint, wrong: Mapping[str, WeightDifference]) -> ir.Model:
    """A copy of a rebuilt `model` with the checkpoint's weights.

    They are those that the bundle reads, which were just found to be the same; only the `wrong` ones are read
    from the checkpoint, so that a large model is not written a second time.
    """
    copy = model.clone()
    sources, held = bind(checkpoint), parameters(bundle)
    unbound = {name: value for name, value in copy.graph.initializers.items() if is_unbound(value)}
    readers = first_readers(copy, unbound.values())
    for name, value in unbound.items():
        if name in held and name not in wrong:
            graft(copy, value, held[name], readers[value])
        else:
            value.const_value = ir.tensor(load_parameter(checkpoint, sources[name], torch.float32).numpy(), name=name)
    return copy


def template_weights(model: ir.Model, plan: ExportPlan, checkpoint: Checkpoint) -> ir.Model:
    """A copy of a template with real weights: each kind has those of the first layer of that kind."""
    first_layer = [plan.kind_of_layer.index(kind) for kind in range(len(plan.kinds))]
    copy = model.clone()
    sources = bind(checkpoint)
    for name, value in copy.graph.initializers.items():
        if not is_unbound(value):
            continue
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(first_layer[int(parts[1])])
        tensor = load_parameter(checkpoint, sources[".".join(parts)], torch.float32)
        value.const_value = ir.tensor(tensor.numpy(), name=name)
    return copy
