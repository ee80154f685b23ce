"""Linear layers: a product with the transpose of a weight becomes one node, which reads the weight as it is stored.

Right because Gemm with these attributes, or MatMul with a turned weight, is the op's definition. Which type the weight
is stored in, or whether it is quantised, is decided after this, when the model is lowered. A bias that a Gemm adds is
split off first, and stays an Add.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import Refusal, constant, dims, integer_attribute, made_by, operand, permutation
from graph_passes.ops.stored_matmul import STORED_MATMUL


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the product to its weight."""
    x, weight = operand(anchor, 0), operand(anchor, 1)
    if anchor.op_type == "Gemm":
        if len(anchor.inputs) > 2 and anchor.inputs[2] is not None:
            raise Refusal("the product has a bias", anchor)
        if integer_attribute(anchor, "transA", 0) != 0 or integer_attribute(anchor, "transB", 0) != 1:
            raise Refusal("not a product with the transpose of its second factor", anchor)
        alpha = anchor.attributes.get("alpha")
        if alpha is not None and alpha.as_float() != 1.0:
            raise Refusal(f"the product is scaled by {alpha.as_float():g}", anchor)
    else:
        turn = made_by(weight, "Transpose")
        if permutation(turn) != [1, 0]:
            raise Refusal("the second factor is no transposed matrix", turn)
        weight = operand(turn, 0)
    if not weight.is_initializer() or constant(weight) is not None or len(dims(weight)) != 2:
        raise Refusal(f"{weight.name!r} is no weight [N, K]", anchor)
    return Match("linear", STORED_MATMUL, anchor, (x, weight), {}, (anchor.outputs[0],))


def split_biases(model: ir.Model) -> None:
    """Gemm with a bias becomes Gemm and Add: x·Wᵀ + b by the operator's definition, where beta is 1."""
    for node in list(model.graph):
        if node.domain != "" or node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        beta = node.attributes.get("beta")
        if beta is not None and beta.as_float() != 1.0:
            continue  # the match will refuse it
        result, bias = node.outputs[0], node.inputs[2]
        product = ir.Value(name=f"{result.name}__product", type=result.type, shape=result.shape)
        kept = {name: attribute for name, attribute in node.attributes.items() if name != "beta"}
        gemm = ir.Node("", "Gemm", list(node.inputs[:2]), list(kept.values()), outputs=[product], name=node.name)
        total = ir.Value(name=f"{result.name}__total", type=result.type, shape=result.shape)
        add = ir.Node("", "Add", [product, bias], outputs=[total], name=f"{node.name}__bias")
        for new in (gemm, add):
            new.metadata_props.update(node.metadata_props)
        name = result.name
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [gemm, add], [result], [total])
        total.name = name


RULE = Rule("linear", STORED_MATMUL, frozenset({("", "Gemm"), ("", "MatMul")}), match, prepare=split_biases)
