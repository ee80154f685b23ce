"""Gives the KV rings another type: float16 as the same node reads it, int8 with a ring of scales beside each.

Which types a ring may have, and how numbers are rounded into it, is the definition of RollingAttention.
"""

from __future__ import annotations

import re
from collections.abc import MutableSequence, Sequence

import onnx_ir as ir

from graph_passes.ops.base import DOMAIN, declare_op
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8
from runtime.errors import FusionError

_RINGS = re.compile(r"(past|present)\.\d+\.(key|value)")
_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}


def scale_ring(ring: str) -> str:
    """The name of the ring of scales beside the int8 ring of that name, such as `past.0.key.scale`."""
    return ring + ".scale"


def lower_kv(model: ir.Model, dtype: str) -> None:
    """Rewrite `model`, whose rings are float32, in place. dtype: "float32", "float16" or "int8".

    Raises FusionError when anything but RollingAttention reads a ring, which could not read it in another type.
    """
    kind = _TYPES[dtype]
    if kind == ir.DataType.FLOAT:
        return
    rings = [v for v in (*model.graph.inputs, *model.graph.outputs) if _RINGS.fullmatch(str(v.name))]
    for ring in rings:
        _refuse_other_readers(ring)
    if kind == ir.DataType.INT8:
        for node in list(model.graph):
            if (node.domain, node.op_type) == (DOMAIN, ROLLING_ATTENTION.name):
                _with_scales(model, node)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if _RINGS.fullmatch(str(value.name)):
            value.type = ir.TensorType(kind)


def _refuse_other_readers(ring: ir.Value) -> None:
    """A Shape node is none: it gives the same of any type."""
    maker = ring.producer()
    for node in [use.node for use in ring.uses()] + ([] if maker is None else [maker]):
        if (node.domain, node.op_type) not in ((DOMAIN, ROLLING_ATTENTION.name), ("", "Shape")):
            raise FusionError(
                f"The ring {ring.name} is read or written by {node.op_type} {node.name!r}, which takes float32 only. "
                "Export with --kv float32 (kv='float32')."
            )


def _with_scales(model: ir.Model, node: ir.Node) -> None:
    attended, *presents = node.outputs
    pasts = [node.inputs[index] for index in (5, 6)]
    scales_in: list[ir.Value] = []
    scales_out: list[ir.Value] = []
    for past, present in zip(pasts, presents, strict=True):
        assert past is not None
        assert past.shape is not None
        shape = ir.Shape(list(past.shape)[:3])
        for ring, made in ((past, scales_in), (present, scales_out)):
            made.append(ir.Value(name=scale_ring(str(ring.name)), type=ir.TensorType(ir.DataType.FLOAT), shape=shape))
    attributes = {
        "scale": node.attributes["scale"].as_float(),
        "window": node.attributes["window"].as_int(),
        "interleaved": node.attributes["interleaved"].as_int(),
        "rounds": node.attributes["rounds"].as_int(),
    }
    names = [value.name for value in node.outputs]
    outputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in (attended, *presents)]
    inputs = [*node.inputs[:7], *scales_in, *node.inputs[7:]]
    made_node = ROLLING_ATTENTION_INT8.node(inputs, attributes, [*outputs, *scales_out])
    made_node.name = node.name
    made_node.metadata_props.update(node.metadata_props)
    declare_op(model, ROLLING_ATTENTION_INT8, attributes, str(node.name))
    model.functions.pop(ROLLING_ATTENTION.function(attributes).identifier(), None)
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [made_node], [attended, *presents], outputs)
    for value, name in zip(outputs, names, strict=True):
        value.name = name
    _put_behind(model.graph.inputs, pasts, scales_in)
    _put_behind(model.graph.outputs, outputs[1:], scales_out)


def _put_behind(
    values: MutableSequence[ir.Value], rings: Sequence[ir.Value | None], scales: Sequence[ir.Value]
) -> None:
    """Each layer's rings of scales come after its rings."""
    place = values.index(rings[-1]) + 1
    for offset, scale in enumerate(scales):
        values.insert(place + offset, scale)
