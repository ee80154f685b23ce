"""The template: one layer of each kind, traced on the meta device, as ONNX IR with unbound weights.

Nothing here depends on the number of layers, and no weight is ever in memory. `trace` is the reference front end; the
others (`exporter.frontends`) bring a step of their own and share the way from a module to a graph.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from exporter.plan import ExportPlan
from graph_passes.ops import OPSET
from graph_passes.unbound import UnboundWeight
from reference.rope import inverse_frequencies
from reference.step import Step
from reference.weights import EMBEDDING, LM_HEAD
from runtime.errors import TraceError

INPUT_IDS, START_POSITIONS, TOKEN_COUNTS = "input_ids", "start_positions", "token_counts"
LOGIT_POSITIONS, LOGITS = "logit_positions", "logits"
INVERSE_FREQUENCIES = "rotary.inverse_frequency_d"
_EXAMPLE_B, _EXAMPLE_T, _EXAMPLE_R, _EXAMPLE_S = 3, 5, 2, 11
"""Any sizes of at least two: torch.export treats 0 and 1 as constants. All distinct, so that no two dims are merged."""


def past_names(layer: int) -> tuple[str, str]:
    """Graph inputs of a layer's key and value rings."""
    return f"past.{layer}.key", f"past.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Graph outputs of a layer's key and value rings; bound to the same memory as `past_names`."""
    return f"present.{layer}.key", f"present.{layer}.value"


def slots_dim(kind: int) -> str:
    """Symbolic name of the ring capacity of a layer kind."""
    return f"S{kind}"


def trace(plan: ExportPlan) -> ir.Model:
    """The reference's step of the template as a raw ONNX graph of opset 24, float32; see `trace_step`."""
    with torch.device("meta"), torch.no_grad():
        step = Step(plan.template, device="meta", dtype=torch.float32).to("meta").eval()
    model = trace_step(step, plan)
    unbind(model, plan, inverse_frequencies(plan.config.rope, plan.config.head_dim))
    return model


def trace_step(step: nn.Module, plan: ExportPlan) -> ir.Model:
    """A step on the meta device as a raw ONNX graph of opset 24, its weights still named as in `step`.

    step: takes what `reference.step.Step` takes, for one layer of each of the plan's kinds, and returns the same.
    Symbolic dims are B, T, R and S0, S1, … (one for each layer kind). Raises TraceError when torch.export does not keep
    them symbolic.
    """
    config = plan.template
    with torch.device("meta"), torch.no_grad():
        tokens = torch.zeros(_EXAMPLE_B, _EXAMPLE_T, dtype=torch.int64)
        # Two tensors: torch.export takes one object that is passed twice for one input.
        start, count = torch.zeros(_EXAMPLE_B, dtype=torch.int64), torch.zeros(_EXAMPLE_B, dtype=torch.int64)
        wanted = torch.zeros(_EXAMPLE_B, _EXAMPLE_R, dtype=torch.int64)
        rings = []
        for kind in range(len(plan.kinds)):
            shape = (_EXAMPLE_B, config.num_kv_heads, _EXAMPLE_S + 2 * kind, config.head_dim)
            rings.append((torch.empty(shape), torch.empty(shape)))
        batch, chunk = Dim("B", min=1, max=2**20), Dim("T", min=1, max=2**20)
        asked = Dim("R", min=1, max=2**20)
        slots = [Dim(slots_dim(kind), min=1, max=2**24) for kind in range(len(plan.kinds))]
        dynamic = (
            {0: batch, 1: chunk},
            {0: batch},
            {0: batch},
            {0: batch, 1: asked},
            [({0: batch, 2: size}, {0: batch, 2: size}) for size in slots],
        )
        inputs = [INPUT_IDS, START_POSITIONS, TOKEN_COUNTS, LOGIT_POSITIONS]
        outputs = [LOGITS]
        for kind in range(len(plan.kinds)):
            inputs += past_names(kind)
            outputs += present_names(kind)
        with _quiet():
            example = (tokens, start, count, wanted, rings)
            program = torch.export.export(step, example, dynamic_shapes=dynamic, strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=inputs,
                output_names=outputs,
            )
    if exported is None:
        raise TraceError("torch.onnx.export returned nothing.")
    model: ir.Model = exported.model
    _name_dims(model, plan)
    return model


def unbind(model: ir.Model, plan: ExportPlan, inverse_frequency_d: torch.Tensor) -> None:
    """Parameters, which have their final names by now, become UnboundWeight; RoPE's frequencies get their values.

    inverse_frequency_d: float32 [D/2].
    """
    tied = model.graph.initializers.get(LM_HEAD) if plan.config.tie_word_embeddings else None
    if tied is not None:  # the tracer keeps one of the two names of shared memory
        model.graph.initializers.pop(LM_HEAD)
        tied.name = EMBEDDING
        model.graph.register_initializer(tied)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if name == INVERSE_FREQUENCIES:
            value.const_value = ir.tensor(inverse_frequency_d.numpy(), name=name)
        else:
            shape = ir.Shape([int(str(extent)) for extent in tensor.shape])  # parameters have fixed sizes
            value.const_value = UnboundWeight(name, tensor.dtype, shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export reports missing torchvision operators and its own deprecations; neither concerns a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_dims(model: ir.Model, plan: ExportPlan) -> None:
    """Give the tracer's symbols (s19, s47) the names that the shapes are talked about with."""
    by_name = {str(value.name): value for value in model.graph.inputs}
    wanted = {(INPUT_IDS, 0): "B", (INPUT_IDS, 1): "T", (LOGIT_POSITIONS, 1): "R"}
    wanted |= {(past_names(kind)[0], 2): slots_dim(kind) for kind in range(len(plan.kinds))}
    renamed: dict[str, str] = {}
    for (name, axis), dim in wanted.items():
        shape = by_name[name].shape
        extent = None if shape is None else shape[axis]
        if extent is None or isinstance(extent, int) or extent.value is None:
            raise TraceError(f"torch.export fixed axis {axis} of {name}, which must stay open ({dim}).")
        renamed[str(extent.value)] = dim
    if len(renamed) != len(wanted):
        raise TraceError(f"torch.export took two of the dims {sorted(wanted.values())} for one.")

    def rename(extent: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(extent, int) or extent.value is None:
            return extent if isinstance(extent, int) else None
        text = re.sub(r"\w+", lambda match: renamed.get(match.group(), match.group()), str(extent.value))
        # The tracer orders the factors of a product by the names that they had; sorted, numbers come first.
        return "*".join(sorted(text.split("*"))) if re.fullmatch(r"\w+(\*\w+)*", text) else text

    nodes = list(model.graph)
    for value in [*model.graph.inputs, *(output for node in nodes for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([rename(extent) for extent in value.shape])
