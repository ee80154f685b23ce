"""When no node can be blamed against golden: golden itself against the reference, and the bundle run as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from exporter.bisect.local import LocalComparison, Off, pairs
from exporter.bisect.stages import Rebuilt
from exporter.bisect.weights import template_weights
from exporter.layer_report import ModuleParity
from exporter.quantized_reference import QuantizedReference
from exporter.taps import RollingTaps, modules_of
from exporter.trace import past_names, present_names
from reference.checkpoint import Checkpoint
from reference.watched import WatchedOracle
from runtime.bundle import Bundle
from runtime.chunking import Step, split_into_steps
from runtime.manifest import LayerKV, Manifest

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TemplateFault:
    """A value that a stage changed, in the template of one layer of each kind: `model` is the template after it."""

    stage: str
    off: Off
    model: ir.Model
    shared: dict[str, str]


def template_fault(rebuilt: Rebuilt, bundle: Bundle, checkpoint: Checkpoint, steps: list[Step]) -> TemplateFault | None:
    """The first stage up to golden's whose template is not what was traced, and where; None when all agree."""
    raw = template_weights(rebuilt.raw, rebuilt.plan, checkpoint)
    local = LocalComparison(raw, _template_manifest(rebuilt, bundle.manifest), None, steps)
    for stage in rebuilt.early:
        model = template_weights(stage.model, rebuilt.plan, checkpoint)
        shared = pairs(model, raw)
        if found := local.off(model, shared):
            return TemplateFault(stage.name, found[0], model, shared)
    return None


def _template_manifest(rebuilt: Rebuilt, manifest: Manifest) -> Manifest:
    """The bundle's manifest with one layer of each kind."""
    layers = []
    for kind in range(len(rebuilt.plan.kinds)):
        held = manifest.kv.layers[rebuilt.plan.kind_of_layer.index(kind)]
        (past_key, past_value), (present_key, present_value) = past_names(kind), present_names(kind)
        layers.append(LayerKV(held.window, held.capacity, past_key, past_value, present_key, present_value))
    return replace(manifest, kv=replace(manifest.kv, layers=tuple(layers)))


def module_off(
    model: ir.Model,
    bundle: Bundle,
    checkpoint: Checkpoint,
    reference: QuantizedReference,
    row: npt.NDArray[np.int64],
    first: ModuleParity,
) -> tuple[Off, dict[str, str]]:
    """The module `first` in the step that shows it first, and the values at which its piece is to be cut.

    Inputs are what the graph itself computed, which agrees with the reference up to this module; expected is the
    reference's output in float64, rounded to float32.
    """
    modules = modules_of(model)
    name = modules[first.module]
    borders = {value: value for path, value in modules.items() if path != "rotary"}
    steps = list(split_into_steps([row], np.zeros(1, np.int64), bundle.manifest.kv.chunk))
    for outputs in WatchedOracle(checkpoint, reference.weights).stages(row.tolist(), torch.float64):
        if first.module in outputs:
            truth = outputs[first.module].numpy()
            break
    rolling = RollingTaps(model, bundle.manifest, bundle.weights_folder, [*borders], in_place=False, native=True)
    for number, (step, (feeds, taps)) in enumerate(zip(steps, rolling.run(steps, 1), strict=True)):
        got = taps[name]
        due = truth[step.offset : step.offset + step.input_ids_BT.shape[1]].reshape(got.shape).astype(got.dtype)
        gap = float(np.abs(due.astype(np.float64) - got).max())
        if not gap <= first.budget:
            inputs = {key: np.array(array) for key, array in (feeds | taps).items()}
            largest = float(np.abs(due).max())
            return Off(name, gap / largest if largest else gap, number, inputs, due, np.array(got)), borders
    raise AssertionError(f"{first.module} was off, and is not off in any step")
