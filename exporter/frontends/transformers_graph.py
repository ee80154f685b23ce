"""What `transformers` traces, brought to the names and the forms that the later stages know.

Three things differ from the reference's graph and are settled here, each exactly: names of parameters and scopes, the
experts' first two matrices in one tensor, and matrix products with three axes on the left.

Shapes: B rows, T tokens, R of them whose logits are asked for, N = B·T, C hidden size, I rows of a weight, E experts.
"""

from __future__ import annotations

import ast
import re

import numpy as np
import onnx_ir as ir

from exporter.trace import INPUT_IDS, INVERSE_FREQUENCIES, LOGIT_POSITIONS
from graph_passes.graph import (
    Dim,
    dims,
    integer_attribute,
    integers,
    is_made_by,
    made_by,
    operand,
    permutation,
    static_dim,
)
from graph_passes.unbound import UnboundWeight, is_unbound
from runtime.errors import TraceError

_DECODER = "decoder"
"""The name of the traced model within `exporter.frontends.transformers_step.TransformersStep`."""

_FLAT = {("B", "T"): ("B*T", INPUT_IDS), ("B", "R"): ("B*R", LOGIT_POSITIONS)}
"""The two leading axes of a product's left side: what they are as one, and the graph's input of that shape."""

_SCOPES, _CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"

_RENAMED = (
    (re.compile(rf"^{_DECODER}(\.model)?(\.|$)"), ""),
    (re.compile(r"^rotary_emb\.inv_freq$"), INVERSE_FREQUENCIES),
    (re.compile(r"^rotary_emb$"), "rotary"),
)
_RENAMED_EXPERTS = (
    (re.compile(r"^(layers\.\d+)\.mlp\.gate(?=\.|$)"), r"\1.moe.router"),
    (re.compile(r"^(layers\.\d+)\.mlp(\.experts)?(?=\.|$)"), r"\1.moe"),
)


def our_name(name: str, *, experts: bool) -> str:
    """The reference's name of a parameter or scope of `transformers`; "" for the model itself."""
    for pattern, replacement in _RENAMED + (_RENAMED_EXPERTS if experts else ()):
        name = pattern.sub(replacement, name)
    return name


def rename(model: ir.Model, *, experts: bool) -> None:
    """Give parameters and scopes the reference's names. experts: whether the layers are mixtures of experts."""
    initializers = model.graph.initializers
    for name in list(initializers):
        value = initializers.pop(name)
        value.name = our_name(name, experts=experts)
        initializers.add(value)
    for node in model.graph:
        if _SCOPES not in node.metadata_props:
            continue
        *scopes, own = ast.literal_eval(node.metadata_props[_SCOPES])
        *classes, operator = ast.literal_eval(node.metadata_props[_CLASSES])
        kept: dict[str, str] = {}  # the first class of each scope: our experts are no module of their own
        for scope, name in zip(scopes, classes, strict=True):
            kept.setdefault(our_name(scope, experts=experts), name)
        node.metadata_props[_SCOPES] = repr([*kept, own])
        node.metadata_props[_CLASSES] = repr([*kept.values(), operator])


def split_gate_and_up(model: ir.Model) -> None:
    """Make gate_up_proj [E, 2I, C] of each layer what a Concat makes of two weights [E, I, C], gate_proj and up_proj.

    The weights of `model` are unbound already, and so are the two.
    """
    for name, value in list(model.graph.initializers.items()):
        if not name.endswith(".gate_up_proj"):
            continue
        experts, rows, inner = (static_dim(value, axis) for axis in range(3))
        halves = []
        for half in ("gate_proj", "up_proj"):
            shape = ir.Shape([experts, rows // 2, inner])
            weight = UnboundWeight(name.replace("gate_up_proj", half), ir.DataType.FLOAT, shape)
            halves.append(ir.Value(name=weight.name, type=value.type, shape=shape, const_value=weight))
            model.graph.register_initializer(halves[-1])
        reader = next(iter(value.uses())).node
        joined = _node("Concat", halves, name, (experts, rows, inner), reader, axis=1)
        model.graph.initializers.pop(name)
        ir.convenience.replace_all_uses_with(value, joined)
        model.graph.insert_before(reader, _maker(joined))


def flatten_products(model: ir.Model) -> None:
    """Write each product [B, T, C] · Wᵀ as Gemm on [N, C] with N = B·T, between two Reshapes; the head's with R for T.

    Both are the same sums, but Gemm reads W [I, C] as it lies in the weights file, while for MatMul ONNX Runtime turns
    it round when it loads the graph: a private copy of every weight. Raises TraceError for a product with a weight
    whose left side is neither [B, T, C] nor [B, R, C].
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    flat: dict[ir.Value, ir.Value] = {}
    for product in list(model.graph):
        weight = _transposed_weight(product)
        if weight is None:
            continue
        x, out, name = operand(product, 0), product.outputs[0], str(product.outputs[0].name)
        leading = dims(x)[:-1]
        if leading not in _FLAT:
            raise TraceError(f"{weight.name} multiplies {x.name!r} of shape {x.shape}, where [B, T, C] is expected.")
        flat_rows, of_that_shape = _FLAT[leading]
        rows, inner = static_dim(weight, 0), static_dim(weight, 1)
        made = []
        if x not in flat:
            rows_first = _constant(model, f"{x.name}_rows", -1, inner)
            flat[x] = _node("Reshape", [x, rows_first], f"{x.name}_flat", (flat_rows, inner), product)
            made.append(flat[x])
        gemm = _node("Gemm", [flat[x], weight], f"{name}_flat", (flat_rows, rows), product, transB=1)
        extents = _node("Shape", [inputs[of_that_shape]], f"{name}_extents", (2,), product)
        width = _constant(model, f"{name}_width", rows)
        shape = _node("Concat", [extents, width], f"{name}_shape", (3,), product, axis=0)
        out.name = f"{name}_by_matmul"
        # An R of 0 is an extent like any other, and not the sign for "as in the input".
        back = _node("Reshape", [gemm, shape], name, (*leading, rows), product, allowzero=1)
        made += [gemm, extents, shape, back]
        model.graph.insert_before(product, [_maker(value) for value in made])
        ir.convenience.replace_all_uses_with(out, back, replace_graph_outputs=True)
        model.graph.remove(product, safe=True)
    _join_reshapes(model)


def _transposed_weight(product: ir.Node) -> ir.Value | None:
    """W of a MatMul with Transpose(W), for a weight W of two axes."""
    if product.op_type != "MatMul" or not is_made_by(product.inputs[1], "Transpose"):
        return None
    transpose = made_by(product.inputs[1], "Transpose")
    weight = operand(transpose, 0)
    return weight if is_unbound(weight) and permutation(transpose) == [1, 0] else None


def _join_reshapes(model: ir.Model) -> None:
    """Of two Reshapes in a row only the last one counts, unless it copies an extent (a 0 without allowzero)."""
    for node in model.graph:
        if node.op_type != "Reshape" or not is_made_by(node.inputs[0], "Reshape"):
            continue
        extents = integers(node.inputs[1])
        if integer_attribute(node, "allowzero", 0) or (extents is not None and 0 not in extents):
            node.replace_input_with(0, operand(made_by(node.inputs[0], "Reshape"), 0))


def _node(
    op: str, inputs: list[ir.Value], name: str, shape: tuple[Dim, ...], like: ir.Node, **attributes: int
) -> ir.Value:
    """The output of a new node in the scope of `like`; float32, or int64 where it is a shape itself."""
    node = ir.node(op, inputs, attributes=attributes, name=f"node_{name}")
    node.metadata_props.update(like.metadata_props)
    output = node.outputs[0]
    output.name, output.shape = name, ir.Shape(shape)
    output.dtype = ir.DataType.INT64 if op == "Shape" or inputs[0].dtype == ir.DataType.INT64 else ir.DataType.FLOAT
    return output


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _constant(model: ir.Model, name: str, *numbers: int) -> ir.Value:
    """A vector of integers as an initializer."""
    value = ir.val(name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
    model.graph.register_initializer(value)
    return value
