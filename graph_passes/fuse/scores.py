"""From a softmax to the two products around it: scale and mask on the way back, rearrangements on the way forward.

softmax: the operator, or exp(x − max) over its own sum. product: MatMul, Einsum, or a sum over elementwise products.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.fuse.masks import Mask, added, chosen, filled
from graph_passes.fuse.walk import forward, only_reader, source, unexpected
from graph_passes.graph import (
    Refusal,
    constant,
    dims,
    integer_attribute,
    integers,
    is_made_by,
    made_by,
    operand,
)

_NO_PART_OF_ATTENTION = {
    "Cast": "the scores are integers or rounded to a narrower type, which the op does not compute",
    "Tanh": "the scores pass through Tanh (soft-capping), which the op does not compute",
    "Concat": "the scores are joined with a column that is no key (such as an attention sink), which takes weight away",
    "Clip": "the scores are clipped, which the op does not compute",
    "Min": "the scores are clipped, which the op does not compute",
    "Max": "the scores are clipped, which the op does not compute",
    "Softmax": "the scores are weights of another softmax",
}
"""What is found between product and softmax, in the words of those who put it there."""

_FAR = 40
"""Values behind an addend in which a product is looked for."""


@dataclass(frozen=True, slots=True)
class Scores:
    """left and right: the factors of the product, in either order. factor: constant between it and the softmax."""

    left: ir.Value
    right: ir.Value
    factor: float
    mask: Mask


def softmax(anchor: ir.Node) -> tuple[ir.Value, ir.Value]:
    """(scores, weights) of a softmax over the last axis, anchored at Softmax or Exp."""
    if anchor.op_type == "Exp":
        return _softmax_of_exp(anchor)
    value = operand(anchor, 0)
    rank = len(dims(value))
    if rank < 3 or integer_attribute(anchor, "axis", -1) not in (rank - 1, -1):
        raise Refusal("not a softmax over the last axis of scores [..., T, S]", anchor)
    return value, anchor.outputs[0]


def _softmax_of_exp(anchor: ir.Node) -> tuple[ir.Value, ir.Value]:
    shifted = made_by(operand(anchor, 0), "Sub")
    value = operand(shifted, 0)
    last = len(dims(value)) - 1
    _check_reduction(made_by(operand(shifted, 1), "ReduceMax"), value, last)
    power = anchor.outputs[0]
    readers = {use.node for use in power.uses()}
    totals = [node for node in readers if node.op_type == "ReduceSum"]
    shares = [node for node in readers if node.op_type == "Div" and node.inputs[0] is power]
    if len(readers) != 2 or len(totals) != 1 or len(shares) != 1 or shares[0].inputs[1] is not totals[0].outputs[0]:
        raise Refusal("exp of the scores is not divided by its own sum at once, as a softmax is", anchor)
    _check_reduction(totals[0], power, last)
    if last < 2:
        raise Refusal("not a softmax over the last axis of scores [..., T, S]", anchor)
    return value, shares[0].outputs[0]


def _check_reduction(node: ir.Node, value: ir.Value, last: int) -> None:
    axes = integers(operand(node, 1))
    if operand(node, 0) is not value or axes not in ([last], [-1]) or not integer_attribute(node, "keepdims", 1):
        raise Refusal("maximum and sum do not run over the last axis of the scores", node)


def factors(node: ir.Node | None) -> tuple[ir.Value, ir.Value] | None:
    """The two factors if `node` is a product that sums: MatMul, Einsum, or ReduceSum of an elementwise Mul."""
    if node is None or node.domain != "":
        return None
    if node.op_type == "ReduceSum" and is_made_by(node.inputs[0], "Mul"):
        node = made_by(operand(node, 0), "Mul")
        if any(constant(v) is not None for v in node.inputs):
            return None
    elif node.op_type not in ("MatMul", "Einsum"):
        return None
    if len(node.inputs) != 2:
        raise Refusal(f"a product of {len(node.inputs)} factors", node)
    return operand(node, 0), operand(node, 1)


def scores(model: ir.Model, value: ir.Value) -> Scores:
    """From what the softmax reads back to the product; refuses anything that is neither scale nor mask."""
    factor, mask = 1.0, None
    while (pair := factors(node := value.producer())) is None:
        if (step := source(value)) is not None:
            value, factor = step.value, factor * step.factor
            continue
        if node is None or node.domain != "":
            raise unexpected(value, "a product of queries and keys")
        if node.op_type in ("Where", "Add", "Sub"):
            value, another = _unmasked(model, node, factor)
            if mask is not None:
                raise Refusal("the scores are masked twice; join the two masks with And first", node)
            mask = another
        elif node.op_type in ("Mul", "Div"):
            raise Refusal("the scores are multiplied by more than one number, which is no scale", node)
        else:
            raise Refusal(_NO_PART_OF_ATTENTION.get(node.op_type) or unexpected(value, "a product").reason, node)
    if mask is None:
        raise Refusal("the scores are not masked", node)
    return Scores(*pair, factor, mask)


def _unmasked(model: ir.Model, node: ir.Node, factor: float) -> tuple[ir.Value, Mask]:
    """(scores, mask) of the Where, Add or Sub that puts them together."""
    if node.op_type == "Where":
        return chosen(node, factor)
    left, right = operand(node, 0), operand(node, 1)
    if _has_product(right) and _has_product(left):
        raise Refusal("two products are added to give the scores (a bias that depends on the query?)", node)
    if _has_product(right):
        if node.op_type == "Sub":
            raise Refusal("the scores are taken off a mask, and so change their sign", node)
        left, right = right, left
    return left, added(model, right, -factor if node.op_type == "Sub" else factor, node)


def _has_product(value: ir.Value) -> bool:
    """Whether a product is found behind `value` before anything that is not a float."""
    seen, queue = {value}, [value]
    while queue and len(seen) < _FAR:
        current = queue.pop(0)
        node = current.producer()
        if node is None or current.dtype is None or not current.dtype.is_floating_point():
            continue
        if factors(node) is not None:
            return True
        for behind in node.inputs:
            if behind is not None and behind not in seen and filled(behind) is None:
                seen.add(behind)
                queue.append(behind)
    return False


def mixed(weights: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
    """(value factor, results) of the product that mixes values by the softmax's weights.

    results: the product's and what rearranges it alone, nearest first.
    """
    last = forward(weights)[-1]
    reader = only_reader(last)
    if reader is None:
        outside = " and the graph returns it" if last.is_graph_output() else ""
        count = len({use.node for use in last.uses()})
        raise Refusal(f"the weights {last.name!r} have {count} readers{outside}, but must have one", last.producer())
    product = reader
    if reader.op_type == "Mul" and (total := only_reader(reader.outputs[0])) is not None:
        product = total
    pair = factors(product)
    if pair is None or last not in pair:
        if reader.op_type in ("Mul", "Div", "Dropout", "Where"):
            raise Refusal(f"{reader.op_type} changes the weights after the softmax, as dropout would", reader)
        raise Refusal(f"the weights should go into a product with the values, but go into {reader.op_type}", reader)
    return pair[1] if pair[0] is last else pair[0], forward(product.outputs[0])
