"""From the template to the whole model: its layers copied L times, ring sizes put in.

The template has one layer of each kind. A node belongs to a layer when the tracer put it in the layer's scope and it
depends on something of that layer's: its weights, its rings, or the hidden states. What a layer computes without them
(shapes, say) is the same for all layers and stays before the first one. What is computed from a layer's rings outside
its scope (a mask over their slots, say) belongs to the layer all the same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporter.plan import ExportPlan
from exporter.trace import past_names, present_names, slots_dim
from graph_passes.unbound import UnboundWeight
from runtime.errors import TraceError

_SCOPES = "pkg.torch.onnx.name_scopes"
_KEPT_METADATA = (
    _SCOPES,
    "pkg.torch.onnx.class_hierarchy",
    "cierzo.rule",
    "cierzo.from",
    "cierzo.replaced",
    "cierzo.proof_error",
    "cierzo.proof_precision",
)


@dataclass(frozen=True, slots=True)
class _Block:
    """One layer of the template: its nodes in order, and the hidden states that enter and leave it.

    Hidden states are [N, C] or [B, T, C], as the front end has them.
    """

    nodes: tuple[ir.Node, ...]
    hidden_in: ir.Value
    hidden_out: ir.Value


def stitch(template: ir.Model, plan: ExportPlan) -> ir.Model:
    """The graph of all L layers; weights unbound, rings of fixed capacity, B and T open.

    Raises TraceError when the template's layers do not hang together by one hidden state each.
    """
    builder = _Builder(template, plan)
    return builder.build()


class _Builder:
    def __init__(self, template: ir.Model, plan: ExportPlan) -> None:
        self._template, self._plan = template, plan
        self._hidden: set[ir.Value] = set()  # values whose data depend on the embedding
        self._owner = self._owners()
        self._graph = ir.Graph([], [], nodes=[], opset_imports=dict(template.graph.opset_imports), name="cierzo")
        self._shared: dict[ir.Value, ir.Value] = {}

    def build(self) -> ir.Model:
        plan, source = self._plan, self._template.graph
        blocks = [self._block(kind) for kind in range(len(plan.kinds))]
        for value in source.inputs:
            if self._ring_kind(value) is None:
                self._shared[value] = self._new_value(value, str(value.name))
                self._graph.inputs.append(self._shared[value])
        for node in source:
            if self._owner[node] == -1:
                self._copy(node, self._shared, {})
        hidden = self._shared[blocks[0].hidden_in]
        presents: list[ir.Value] = []
        for layer, kind in enumerate(plan.kind_of_layer):
            hidden, rolled = self._layer(blocks[kind], kind, layer, hidden)
            presents += rolled
        self._shared[blocks[-1].hidden_out] = hidden
        for node in source:
            if self._owner[node] == len(plan.kinds):
                self._copy(node, self._shared, {})
        logits = self._shared[source.outputs[0]]
        self._graph.outputs.extend([logits, *presents])
        # A rule on the way to another leaves a body behind that no node calls.
        used = _called(self._graph, self._template.functions)
        functions = [body.clone() for name, body in self._template.functions.items() if name in used]
        return ir.Model(self._graph, ir_version=self._template.ir_version, functions=functions)

    def _owners(self) -> dict[ir.Node, int]:
        """−1 before the layers, 0 … K − 1 within them, K after them."""
        owner: dict[ir.Node, int] = {}
        kinds = len(self._plan.kinds)
        rank: dict[ir.Value, int] = {}  # the latest layer that a value depends on, −1 for none
        for value in self._template.graph.inputs:
            kind = self._ring_kind(value)
            rank[value] = -1 if kind is None else kind
        for node in self._template.graph:
            inputs = [v for v in node.inputs if v is not None]
            latest = max((rank.get(v, _weight_kind(v)) for v in inputs), default=-1)
            is_hidden = any(v in self._hidden or v.name == "embed_tokens.weight" for v in inputs)
            kind = _scope_kind(node)
            if kind is None:
                owner[node] = kinds if is_hidden and latest >= 0 else latest
            else:
                owner[node] = kind if is_hidden or latest == kind else -1
            for output in node.outputs:
                rank[output] = max(latest, owner[node])
                if is_hidden and node.op_type != "Shape":
                    self._hidden.add(output)
        return owner

    def _ring_kind(self, value: ir.Value) -> int | None:
        match = re.fullmatch(r"past\.(\d+)\.\w+", str(value.name))
        return int(match.group(1)) if match else None

    def _block(self, kind: int) -> _Block:
        nodes = tuple(node for node in self._template.graph if self._owner[node] == kind)
        own = set(nodes)
        incoming = {
            v
            for node in nodes
            for v in node.inputs
            if v is not None and v.producer() is not None and v.producer() not in own and v in self._hidden
        }
        outgoing = {
            v
            for node in nodes
            for v in node.outputs
            if any(use.node not in own for use in v.uses()) and not v.is_graph_output()
        }
        if len(incoming) != 1 or len(outgoing) != 1:
            raise TraceError(
                f"Layer {kind} of the traced template takes {sorted(str(v.name) for v in incoming)} in and gives "
                f"{sorted(str(v.name) for v in outgoing)} out, where one hidden state each is expected."
            )
        return _Block(nodes, incoming.pop(), outgoing.pop())

    def _layer(self, block: _Block, kind: int, layer: int, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """Copy a block as layer `layer`; returns the hidden states after it and its rolled rings."""
        own: dict[ir.Value, ir.Value] = {block.hidden_in: hidden}
        by_name = {str(v.name): v for v in self._template.graph.inputs}
        for old, new in zip(past_names(kind), past_names(layer), strict=True):
            ring = self._new_value(by_name[old], new)
            self._graph.inputs.append(ring)
            own[by_name[old]] = ring
        names = dict(zip(present_names(kind), present_names(layer), strict=True))
        for node in block.nodes:
            self._copy(node, own, names, (f"layers.{kind}", f"layers.{layer}"))
        outputs = {str(v.name): v for v in self._template.graph.outputs}
        return own[block.hidden_out], [own[outputs[name]] for name in present_names(kind)]

    def _copy(
        self,
        node: ir.Node,
        mapping: dict[ir.Value, ir.Value],
        names: Mapping[str, str],
        rename: tuple[str, str] | None = None,
    ) -> None:
        old_prefix, new_prefix = rename or ("", "")

        def named(name: str) -> str:
            """Names of the tracer are unique within the template; a layer's copy carries the layer's prefix."""
            if name in names:
                return names[name]
            return f"{new_prefix}.{name}" if rename else name

        def mapped(value: ir.Value | None) -> ir.Value | None:
            if value is None:
                return None
            if value in mapping:
                return mapping[value]
            if value in self._shared:
                return self._shared[value]
            if not value.is_initializer():
                raise TraceError(f"{value.name!r} is read by {node.op_type} before it exists.")
            name = str(value.name)
            of_layer = rename is not None and name.startswith(f"{old_prefix}.")
            new = self._initializer(value, new_prefix + name[len(old_prefix) :] if of_layer else name)
            (mapping if of_layer else self._shared)[value] = new
            return new

        outputs = [self._new_value(v, named(str(v.name))) for v in node.outputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            [mapped(v) for v in node.inputs],
            list(node.attributes.values()),
            outputs=outputs,
            name=named(str(node.name)),
        )
        for key in _KEPT_METADATA:
            if (text := node.metadata_props.get(key)) is not None:
                pattern = rf"\b{re.escape(old_prefix)}\b"
                copy.metadata_props[key] = re.sub(pattern, new_prefix, text) if rename and key == _SCOPES else text
        mapping.update(zip(node.outputs, outputs, strict=True))
        self._graph.append(copy)

    def _initializer(self, value: ir.Value, name: str) -> ir.Value:
        tensor = value.const_value
        if isinstance(tensor, UnboundWeight):
            tensor = UnboundWeight(name, tensor.dtype, tensor.shape)
        new = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
        self._graph.register_initializer(new)
        return new

    def _new_value(self, value: ir.Value, name: str) -> ir.Value:
        sizes = {slots_dim(kind): self._plan.capacity(kind) for kind in range(len(self._plan.kinds))}
        shape = None
        if value.shape is not None:
            shape = ir.Shape([d if isinstance(d, int) else sizes.get(str(d.value), d.value) for d in value.shape])
        return ir.Value(name=name, type=value.type, shape=shape)


def _called(
    nodes: Iterable[ir.Node], functions: Mapping[ir.OperatorIdentifier, ir.Function]
) -> set[ir.OperatorIdentifier]:
    """The functions that the nodes call, and those that these call."""
    called: set[ir.OperatorIdentifier] = set()
    front = [node.op_identifier() for node in nodes]
    while front:
        name = front.pop()
        if name in functions and name not in called:
            called.add(name)
            front += [node.op_identifier() for node in functions[name]]
    return called


def _weight_kind(value: ir.Value) -> int:
    """The template layer whose parameter `value` is, −1 for anything else."""
    match = re.match(r"layers\.(\d+)\.", str(value.name)) if value.is_initializer() else None
    return int(match.group(1)) if match else -1


def _scope_kind(node: ir.Node) -> int | None:
    """The template layer in whose scope the tracer met `node`."""
    text = node.metadata_props.get(_SCOPES)
    for scope in ast.literal_eval(text) if text else ():
        if match := re.match(r"layers\.(\d+)(\.|$)", scope):
            return int(match.group(1))
    return None
