"""Faults of the mutation suite in whole bundles: what a pass could have got wrong, planted in the graph that it left.

A fault changes a match: its attributes, the order of its inputs, or the op's function body. In a finished graph the
same is done to the node that the match became, or, where a later fusion took that node in, to the call in its body.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from graph_passes.ops import DOMAIN, OPS
from graph_passes.ops.base import PluginOp


@dataclass(frozen=True, slots=True)
class Site:
    """A node as the faults see a match."""

    op: PluginOp
    inputs: tuple[str, ...]
    attributes: dict[str, int | float | str]


def plant(model: onnx.ModelProto, op: str, change: Callable[[Any], Any]) -> bool:
    """Change the last node of `op` in the graph, or the call of it in a function body; False where there is neither."""
    found = _site(model, op)
    if found is None:
        return False
    node, caller = found
    site = Site(OPS[op], tuple(node.input), _attributes(node, caller, OPS[op]))
    wrong = change(site)
    node.input[:] = wrong.inputs
    for name, value in wrong.attributes.items():
        if value != site.attributes[name]:
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    if wrong.op is not site.op or wrong.attributes != site.attributes:  # a body may be written for its attributes
        body = ir.to_proto(wrong.op.function(wrong.attributes))
        (present,) = [function for function in model.functions if (function.domain, function.name) == (DOMAIN, op)]
        present.CopyFrom(body)
    return True


def _site(model: onnx.ModelProto, op: str) -> tuple[onnx.NodeProto, onnx.NodeProto | None] | None:
    """The node, and for one in a function body a node of the graph that calls that function."""
    own = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, op)]
    if own:
        return own[-1], None
    for function in model.functions:
        for node in function.node:
            if (node.domain, node.op_type) == (DOMAIN, op):
                callers = [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, function.name)]
                if callers:
                    return node, callers[-1]
    return None


def _attributes(node: onnx.NodeProto, caller: onnx.NodeProto | None, op: PluginOp) -> dict[str, int | float | str]:
    given = {attribute.name: attribute for attribute in node.attribute}
    outer = {} if caller is None else {attribute.name: attribute for attribute in caller.attribute}
    found: dict[str, int | float | str] = {}
    for name in op.attributes:
        attribute = given[name]
        value = onnx.helper.get_attribute_value(
            outer[attribute.ref_attr_name] if attribute.ref_attr_name else attribute
        )
        found[name] = value.decode() if isinstance(value, bytes) else value
    return found
