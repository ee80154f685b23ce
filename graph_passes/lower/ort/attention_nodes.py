"""Reads the attention nodes of a graph, and refuses all that ONNX Runtime's kernels cannot compute exactly.

Everything is checked before anything is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.lower.arithmetic import ARITHMETIC
from graph_passes.ops.base import DOMAIN
from graph_passes.ops.packed_attention import PACKED_ROLLING_ATTENTION
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8
from graph_passes.ops.sliding_window_attention import FULL
from runtime.errors import BackendError, FusionError

MOST_HEAD_DIM = 256
HEAD_DIM_STEP = 8
"""PagedAttention takes heads of a multiple of HEAD_DIM_STEP and of at most MOST_HEAD_DIM, since FlashAttention does."""

_MARKS = {"plugin_namespace", "plugin_version"}


@dataclass(frozen=True, slots=True)
class AttentionNode:
    """A RollingAttention or PackedRollingAttention as the passes need it.

    projected: [B, T, H + 2 G, D] alone, or query [B, T, H, D], key and value [B, T, G, D]. cos, sin: [B, T, D/2].
    past: rings of keys and of values [B, G, capacity, D]; present: the same after the write. start, count: int64 [B].
    attended: [B, T, H, D]; all its readers are Reshapes that make the same of [B, T, H·D]. window:
    None where there is none. dtype: of the arithmetic and the rings.
    """

    node: ir.Node
    projected: tuple[ir.Value, ...]
    cos: ir.Value
    sin: ir.Value
    past: tuple[ir.Value, ir.Value]
    start: ir.Value
    count: ir.Value
    attended: ir.Value
    present: tuple[ir.Value, ir.Value]
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    window: int | None
    scale: float
    interleaved: int
    dtype: ir.DataType


def read_attention(model: ir.Model) -> list[AttentionNode]:
    """The attention nodes of `model` in their order.

    Raises FusionError for a graph that is none of Cierzo's, and BackendError for a model that has no exact form here.
    """
    found = []
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == ROLLING_ATTENTION_INT8.name:
            raise BackendError(
                f"{node.name} keeps keys and values in int8, which ONNX Runtime's attention on CUDA does not read. "
                "Export the checkpoint with --kv float16 (kv='float16')."
            )
        if node.domain == DOMAIN and node.op_type in (ROLLING_ATTENTION.name, PACKED_ROLLING_ATTENTION.name):
            found.append(_read(node))
    if not found:
        raise FusionError("The graph has no attention node of Cierzo's. Export the checkpoint again.")
    rows = {(layer.start, layer.count) for layer in found}
    kinds = {layer.dtype for layer in found}
    if len(rows) != 1 or len(kinds) != 1:
        raise FusionError(
            "The attention nodes of the graph read different start positions or counts, or compute in different types, "
            "and an engine has one of each. Export the checkpoint again."
        )
    return found


def _read(node: ir.Node) -> AttentionNode:
    op = PACKED_ROLLING_ATTENTION if node.op_type == PACKED_ROLLING_ATTENTION.name else ROLLING_ATTENTION
    packed = op is PACKED_ROLLING_ATTENTION
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) != len(op.inputs) or len(node.outputs) != len(op.outputs):
        raise _unknown(node, f"has {len(inputs)} inputs and {len(node.outputs)} outputs")
    if node.attributes.keys() - _MARKS != op.attributes.keys():
        raise _unknown(node, f"has the attributes {', '.join(sorted(node.attributes))}")
    projected = tuple(inputs[: len(inputs) - 6])
    cos, sin, past_key, past_value, start, count = inputs[len(inputs) - 6 :]
    attended, present_key, present_value = node.outputs
    head_dim = _extent(node, projected[0], 3)
    layer = AttentionNode(
        node=node,
        projected=projected,
        cos=cos,
        sin=sin,
        past=(past_key, past_value),
        start=start,
        count=count,
        attended=attended,
        present=(present_key, present_value),
        heads=node.attributes["heads"].as_int() if packed else _extent(node, projected[0], 2),
        kv_heads=_extent(node, past_key, 1),
        head_dim=head_dim,
        capacity=_extent(node, past_key, 2),
        window=None if node.attributes["window"].as_int() == FULL else node.attributes["window"].as_int(),
        scale=node.attributes["scale"].as_float(),
        interleaved=node.attributes["interleaved"].as_int(),
        dtype=_dtype(node, projected, (past_key, past_value)),
    )
    _refuse_other_shapes(layer)
    _refuse_other_readers(layer)
    _refuse_head_dim(layer)
    return layer


def _unknown(node: ir.Node, what: str) -> FusionError:
    return FusionError(
        f"{node.op_type} {node.name!r} {what}, which this version does not know. Export the checkpoint again with it."
    )


def _extent(node: ir.Node, value: ir.Value, axis: int) -> int:
    extent = value.shape[axis] if value.shape is not None and len(value.shape) == 4 else None
    if not isinstance(extent, int) or extent < 1:
        raise _unknown(node, f"reads {value.name!r} of the shape {value.shape}, where axis {axis} is no fixed size")
    return extent


def _dtype(node: ir.Node, projected: tuple[ir.Value, ...], past: tuple[ir.Value, ...]) -> ir.DataType:
    dtype = projected[0].dtype
    if dtype is None or dtype not in ARITHMETIC.values() or any(value.dtype != dtype for value in projected):
        raise _unknown(node, f"attends in {', '.join(str(value.dtype) for value in projected)}")
    if other := [value for value in past if value.dtype != dtype]:
        raise BackendError(
            f"The ring {other[0].name} is {other[0].dtype}, but ONNX Runtime's attention on CUDA computes in the type "
            f"of its rings, and this engine computes in {dtype}. Build it with rings of the type of its arithmetic."
        )
    return dtype


def _refuse_other_shapes(layer: AttentionNode) -> None:
    node, H, G, D = layer.node, layer.heads, layer.kv_heads, layer.head_dim
    widths = [H + 2 * G] if len(layer.projected) == 1 else [H, G, G]
    for value, width in zip(layer.projected, widths, strict=True):
        if (_extent(node, value, 2), _extent(node, value, 3)) != (width, D):
            raise _unknown(node, f"reads {value.name!r} of the shape {value.shape} for {H} heads on {G} of {D}")
    for ring in layer.past:
        if tuple(_extent(node, ring, axis) for axis in (1, 2, 3)) != (G, layer.capacity, D):
            raise _unknown(node, f"reads the ring {ring.name!r} of the shape {ring.shape} for {G} heads of {D}")
    if H % G or layer.interleaved not in (0, 1) or (layer.window is not None and layer.window < 1):
        raise _unknown(node, f"has {H} heads on {G}, window {layer.window} and interleaved {layer.interleaved}")


def _refuse_other_readers(layer: AttentionNode) -> None:
    for past, present in zip(layer.past, layer.present, strict=True):
        alone = [use.node for use in past.uses()] == [layer.node] and not present.uses()
        if not (alone and past.is_graph_input() and present.is_graph_output()):
            raise _unknown(layer.node, f"is not the only one that reads {past.name} and writes {present.name}")
    if layer.attended.is_graph_output() or not all(_takes_rows(use.node, layer) for use in layer.attended.uses()):
        raise _unknown(layer.node, f"makes {layer.attended.name!r}, which others read than Reshapes of it to rows")


def _takes_rows(reader: ir.Node, layer: AttentionNode) -> bool:
    if (reader.domain, reader.op_type) != ("", "Reshape") or reader.inputs[0] is not layer.attended:
        return False
    shape = reader.inputs[1].const_value if reader.inputs[1] is not None else None
    return shape is not None and 0 not in shape.numpy()[2:]  # which would stand for an extent that is another one here


def _refuse_head_dim(layer: AttentionNode) -> None:
    if layer.window is not None and (layer.head_dim % HEAD_DIM_STEP or layer.head_dim > MOST_HEAD_DIM):
        raise BackendError(
            f"{layer.node.name} has a window and heads of {layer.head_dim}, but ONNX Runtime's attention on CUDA keeps "
            f"to a window only for heads of a multiple of {HEAD_DIM_STEP} and at most {MOST_HEAD_DIM}. Run this model "
            "with another backend, such as 'onnxruntime' on the CPU."
        )
