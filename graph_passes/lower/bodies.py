"""Gives the plugin nodes of a bundle the function bodies of this version.

A bundle carries the bodies of the version that exported it. They compute the same function, but lowering counts on what
today's accept, such as activations of another type than the rotary tables.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.ops import DOMAIN, OPS
from graph_passes.ops.base import Attributes, PluginOp, declare_op
from runtime.errors import FusionError


def refresh_bodies(model: ir.Model) -> None:
    """Rewrite `model` in place. Raises FusionError for a node that this version does not know, or not so."""
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        model.functions.pop(identifier)
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        op = OPS.get(node.op_type)
        if op is None or not op.attributes.keys() <= node.attributes.keys():
            raise FusionError(
                f"{node.name}: this version does not know {node.op_type} with the attributes "
                f"{', '.join(sorted(node.attributes))}. Export the checkpoint again with it."
            )
        attributes = {name: _READERS[kind](node.attributes[name]) for name, kind in op.attributes.items()}
        _declare(model, op, attributes, str(node.name))


def _declare(model: ir.Model, op: PluginOp, attributes: Attributes, place: str) -> None:
    """What a body calls first: ONNX's own evaluator knows no function before it was declared."""
    for called in op.calls:
        _declare(model, called, attributes, place)
    declare_op(model, op, attributes, place)


_READERS = {
    "int": lambda attribute: attribute.as_int(),
    "float": lambda attribute: attribute.as_float(),
    "string": lambda attribute: attribute.as_string(),
}
