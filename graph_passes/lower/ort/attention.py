"""Attention as ONNX Runtime's CUDA kernels run fastest: the entry of this part of the lowering.

    no window          RotaryEmbedding, TensorScatter, Attention (FlashAttention, causal by the number of keys)
    window, one token  RotaryEmbedding, TensorScatter (circular), Attention over the whole ring
    window, many       RotaryEmbedding, PagedAttention over the ring laid out straight

Both steps of an engine read and write the same rings [B, S, G·D]: S is the window, or the context and a chunk.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.lower.ort.attention_nodes import AttentionNode, read_attention
from graph_passes.lower.ort.full_attention import attend_to_all
from graph_passes.lower.ort.plan import AttentionPlan, Ring, ScratchMemory
from graph_passes.lower.ort.ring_decode import RingDecode
from graph_passes.lower.ort.ring_prefill import Pages, RingPrefill, done, scratch_slots
from graph_passes.lower.ort.rope import projections
from graph_passes.lower.ort.step import Step


def lower_attention(model: ir.Model, step: str, chunk: int) -> AttentionPlan:
    """Rewrite every attention node of `model` for a `step`, PREFILL or DECODE, in place.

    model: after `lower_arithmetic`, `merge_products` and `pack_attention`, with rings of the arithmetic's type; for
    DECODE its T is 1. chunk: most tokens of a row in a step. Rings become [B, S, G·D]. PREFILL with a window gets the
    input BOUNDS and the outputs that the plan's scratch names; DECODE reads no counts.

    Raises BackendError for what ONNX Runtime's kernels do not compute exactly, FusionError for a graph that is none of
    Cierzo's; `model` is unchanged then.
    """
    layers = read_attention(model)
    rings = tuple(_ring(layer, chunk) for layer in layers)
    state = Step(model, step, layers[0])
    for layer, ring in zip(layers, rings, strict=True):
        for past in layer.past:
            past.shape = ir.Shape([state.batch, ring.slots, layer.kv_heads * layer.head_dim])
    if state.decodes:
        _decode(model, state, layers, rings)
        return AttentionPlan(rings, None)
    return AttentionPlan(rings, _prefill(model, state, layers, rings, chunk))


def _ring(layer: AttentionNode, chunk: int) -> Ring:
    (past_key, past_value), (present_key, present_value) = layer.past, layer.present
    return Ring(
        past_key=str(past_key.name),
        past_value=str(past_value.name),
        present_key=str(present_key.name),
        present_value=str(present_value.name),
        slots=layer.capacity + chunk if layer.window is None else layer.window,
        window=layer.window,
    )


def _decode(model: ir.Model, step: Step, layers: list[AttentionNode], rings: tuple[Ring, ...]) -> None:
    windows: dict[int, RingDecode] = {}
    for layer, ring in zip(layers, rings, strict=True):
        step.nodes.move_to(layer.node)
        turned = projections(step, layer)
        if layer.window is None:
            attended, present = attend_to_all(step, layer, turned, ring.slots)
        else:
            if layer.window not in windows:
                windows[layer.window] = RingDecode(step, layer.window)
            attended, present = windows[layer.window].attend(layer, turned)
        _replace(model, layer, attended, present)


def _prefill(
    model: ir.Model, step: Step, layers: list[AttentionNode], rings: tuple[Ring, ...], chunk: int
) -> ScratchMemory | None:
    sizes = [layer.window for layer in layers if layer.window is not None]
    slots = scratch_slots(sizes, chunk) if sizes else 0
    pages = Pages(step, slots) if sizes else None
    windows: dict[int, RingPrefill] = {}
    last: tuple[AttentionNode, tuple[ir.Value, ir.Value]] | None = None
    scratch: list[ir.Value] = []
    for layer, ring in zip(layers, rings, strict=True):
        step.nodes.move_to(layer.node)
        turned = projections(step, layer)
        if layer.window is None or pages is None:
            attended, present = attend_to_all(step, layer, turned, ring.slots)
        else:
            if layer.window not in windows:
                windows[layer.window] = RingPrefill(pages, layer.window)
            free = done(step, *last) if last is not None else None
            attended, present, used = windows[layer.window].attend(layer, turned, free)
            last = layer, present
            scratch += used
        _replace(model, layer, attended, present)
    if pages is None:
        return None
    model.graph.inputs.append(pages.bounds)
    model.graph.outputs.extend(scratch)
    names = [str(value.name) for value in scratch]
    keys, values = ([name for i in range(0, len(names), 4) for name in names[i + k : i + k + 2]] for k in (0, 2))
    return ScratchMemory(slots, tuple(keys), tuple(values))


def _replace(model: ir.Model, layer: AttentionNode, attended: ir.Value, present: tuple[ir.Value, ir.Value]) -> None:
    """Put the new values in the place of the layer's; the rings keep their names."""
    for reader in [use.node for use in layer.attended.uses()]:
        rows = reader.outputs[0]
        if not rows.is_graph_output() and rows.shape is not None and rows.shape == attended.shape:
            ir.convenience.replace_all_uses_with(rows, attended)
            model.graph.remove(reader, safe=True)
        else:
            reader.replace_input_with(0, attended)
    names = [str(value.name) for value in layer.present]
    for old, new in zip(layer.present, present, strict=True):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(layer.node, safe=True)
    for new, name in zip(present, names, strict=True):
        new.name = name
