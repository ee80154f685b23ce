"""MoE gate: the experts of a token and their weights, however they are worked out from its logits, become one node.

Softmax first or last, in one operator or in pieces, a division or a product with the reciprocal, a sort instead of a
top-k: all are the softmax over the K best logits, since softmax keeps the order and the sum over all experts cancels.
So the walk goes from TopK through score functions back to what could be the logits, and forward to what could be the
weights and the expert numbers; one run on the op's examples tells which values they are, and the driver's proof holds
the node to it. Every operator on the way treats all experts alike and none has a threshold, except those that
`_is_known` looks into; so what agrees on spread, nearly equal, exactly tied and far-off logits agrees on all. Ties go
to the lower expert: a spelling that breaks them otherwise is another function, and is refused.

A small number added to the sum (1e-20, to divide by) is accepted as far as it is less than rounding: the K best of E
probabilities add up to at least K/E, so that it changes a weight by less than E/K of itself. Where the scores are no
probabilities (exp without a softmax) the far-off logits show the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.driver_types import Adapted, Match, Operand, Rule, as_fed, shape_of
from graph_passes.fuse.walk import REARRANGEMENTS, cone, data_inputs
from graph_passes.graph import (
    Dim,
    Refusal,
    constant,
    data_leaves,
    dims,
    integer_attribute,
    is_made_by,
    operand,
    scalar,
    static_dim,
)
from graph_passes.ops.moe_gate import MOE_GATE
from graph_passes.prove import first_that_holds
from graph_passes.region import Region

_SCORES = REARRANGEMENTS - {"Gather", "GatherElements"} | {
    *("Softmax", "LogSoftmax", "Exp", "Log", "ReduceMax", "ReduceSum", "ReduceLogSumExp"),
    *("Sub", "Div", "Mul", "Neg"),
}
"""What stands between the logits and TopK: functions that treat all experts alike."""

_WEIGHTS = _SCORES | {
    *("Gather", "GatherElements", "ScatterElements", "Equal", "Where"),
    *("Add", "Reciprocal", "ReduceL1", "Clip"),
}
"""What stands between TopK and the weights: the same, what puts experts in their places, and guards of a division."""

_SHAPES = {"Shape", "Size", "ConstantOfShape", "Range"}

_ROUNDED = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
"""Types in which logits and weights lose digits. ONNX Runtime may leave such a cast out, so that no run shows it."""

_GUARD = 1e-6
"""Largest number below which a sum of probabilities may be cut off, to divide by it."""

_MARKS = (0.0, 1.0, -np.inf)
"""Numbers that a mask is compared with; logits and probabilities of just these values are among the examples."""

_FARTHEST = 40
"""Values on either side of TopK within which a gate lies."""

_SAME = 1e-5
Array = npt.NDArray[Any]
Runs = list[list[Array]]


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From TopK back to the router's logits and forward to the renormalised weights."""
    scores = operand(anchor, 0)
    if not integer_attribute(anchor, "largest", 1):
        raise Refusal("TopK takes the smallest scores, not the largest", anchor)
    if integer_attribute(anchor, "axis", -1) not in (-1, len(dims(scores)) - 1):
        raise Refusal("the TopK does not run over the last axis, the experts of [N, E] logits", anchor)
    if not isinstance(dims(scores)[-1], int):
        raise Refusal(f"the number of experts is {dims(scores)[-1]}, but must be a fixed size", anchor)
    if dims(anchor.outputs[0])[-1] == 0:
        raise Refusal(f"it chooses 0 of {dims(scores)[-1]} experts", anchor)
    if data_leaves(operand(anchor, 1)):
        raise Refusal("the number of experts per token is not a constant", anchor)
    weights, experts, barred = _made_of(anchor)
    broken: Refusal | None = None
    for logits in _logits(scores):
        alone = [value for value in weights if data_leaves(value, [logits]) == [logits]]
        try:
            if not alone:
                raise _needs_more(anchor, logits, weights)
            return first_that_holds(model, [_reading(model, anchor, logits, alone, experts, barred)])
        except Refusal as refusal:
            last = refusal if len(alone) == len(weights) else _needs_more(anchor, logits, weights)
            broken = broken or last
    raise broken or Refusal("there are no float32 logits [N, E] behind it", anchor)


def _made_of(anchor: ir.Node) -> tuple[list[ir.Value], list[ir.Value], ir.Node | None]:
    """What could be (weights, expert numbers): all [N, K] that are made of what TopK found, nearest first.

    And the first node that makes [N, K] or [N, 1] of the weights in a way that is not known.
    """
    queue, seen = list(anchor.outputs), set(anchor.outputs)
    weights: list[ir.Value] = []
    experts: list[ir.Value] = []
    barred: ir.Node | None = None
    while queue and len(seen) < _FARTHEST:
        value = queue.pop(0)
        if value.shape is not None and len(value.shape) == 2 and isinstance(dims(value)[1], int):
            (experts if value.dtype == ir.DataType.INT64 else weights).append(value)
        for use in value.uses():
            node = use.node
            if not _is_known(node, _WEIGHTS):
                barred = barred or (node if _changes_weights(value, node) else None)
                continue
            new = [output for output in node.outputs if output not in seen and value in data_inputs(node)]
            seen.update(new)
            queue += new
    if weights and experts:
        return weights, experts, barred
    shape = dims(anchor.outputs[0])
    if not isinstance(shape[-1], int):
        raise Refusal("the number of experts per token is not a constant", anchor)
    raise Refusal(f"weights and experts are [{', '.join(map(str, shape))}] and are never made [N, K]", anchor)


def _is_known(node: ir.Node, allowed: Collection[str]) -> bool:
    """Whether the node is a standard operator of `allowed` that neither rounds nor has a threshold for some values."""
    if node.domain != "" or node.op_type not in allowed or any(v.dtype in _ROUNDED for v in node.outputs):
        return False
    if node.op_type == "Clip":
        low, high = (scalar(v) for v in [*node.inputs, None, None][1:3])
        endless = high is None and (len(node.inputs) < 3 or node.inputs[2] is None)
        return (
            endless and low is not None and 0 <= low <= _GUARD and is_made_by(node.inputs[0], "ReduceSum", "ReduceL1")
        )
    if node.op_type == "Equal":
        compared = [scalar(v) for v in node.inputs if constant(v) is not None]
        floats = any(v is not None and v.dtype == ir.DataType.FLOAT for v in node.inputs)
        return not floats or all(number in _MARKS for number in compared)
    return True


def _changes_weights(value: ir.Value, node: ir.Node) -> bool:
    """Whether the node makes [N, K] or [N, 1] of `value`, which is [N, K]; a cast counts as none."""
    made = node.outputs[0]
    if value.dtype != ir.DataType.FLOAT or node.domain != "" or node.op_type == "Cast":
        return False
    if value.shape is None or made.shape is None or len(value.shape) != 2 or len(made.shape) != 2:
        return False
    return dims(made)[1] in (1, dims(value)[1])


def _logits(scores: ir.Value) -> Iterator[ir.Value]:
    """What TopK's scores could be made of: values with the experts along the last axis, flat ones and farthest first.

    The farther, the more of the graph becomes part of the node.
    """
    near = iter(range(_FARTHEST))
    behind = cone(scores, _SCORES, stop=lambda value: value.dtype in _ROUNDED or next(near, None) is None)
    for value in sorted(reversed(behind.values), key=lambda value: len(value.shape or ()) != 2):
        shape = dims(value) if value.shape is not None and value.dtype == ir.DataType.FLOAT else ()
        if len(shape) in (2, 3) and shape[-1] == dims(scores)[-1] and data_leaves(scores, [value]) == [value]:
            yield value


def _reading(
    model: ir.Model,
    anchor: ir.Node,
    logits: ir.Value,
    weights: list[ir.Value],
    experts: list[ir.Value],
    barred: ir.Node | None,
) -> Match:
    """The match whose values one run of the examples shows to be weights and experts."""
    experts = [value for value in experts if data_leaves(value, [logits]) == [logits]]
    rng = np.random.default_rng(0)
    adapted = _flattened(logits, dims(weights[0])[0])
    given = [arrays[0] for arrays in MOE_GATE.examples(rng, {"top_k": 1}, [shape_of(adapted)])]
    region = Region(model, [logits], [*weights, *experts])
    got = [region.run([as_fed(adapted, array)]) for array in given]
    numbers = [value for value in experts if _right(got, given, len(weights) + experts.index(value), value, _best)]
    if not numbers:
        raise _other_experts(anchor, got, given, len(weights), experts)
    for index, value in reversed([*enumerate(weights)]):
        expert = next((number for number in reversed(numbers) if dims(number) == dims(value)), None)
        if expert is not None and _right(got, given, index, value, _weights):
            return _checked(anchor, logits, value, expert)
    if barred is not None:
        raise Refusal(f"{barred.op_type} changes the weights after TopK, and is no part of a gate", barred)
    raise _other_weights(logits, got, given, weights, numbers[-1])


def _right(got: Runs, given: list[Array], index: int, value: ir.Value, function: Callable[[Array, int], Array]) -> bool:
    """Whether output `index` of every run is what the op's function gives of the example."""
    top_k = dims(value)[1]
    if not isinstance(top_k, int) or not 1 <= top_k <= given[0].shape[1]:
        return False
    return all(_close(arrays[index], function(x, top_k)) for arrays, x in zip(got, given, strict=True))


def _checked(anchor: ir.Node, logits: ir.Value, weight: ir.Value, expert: ir.Value) -> Match:
    """The match, unless what TopK found is read beside the gate: then TopK would stay, and nothing be gained."""
    inside = {node for value in (weight, expert) for node in _between(value, logits)}
    for node in inside:
        if not _is_known(node, _WEIGHTS | _SHAPES | {"TopK"}):
            raise Refusal(f"{node.op_type} is no part of a gate", node)
    for output in anchor.outputs:
        outside = [use.node for use in output.uses() if use.node not in inside and output is not expert]
        if output not in (weight, expert) and (outside or output.is_graph_output()):
            name = "unnormalised probabilities" if output is anchor.outputs[0] else "expert numbers of TopK"
            raise Refusal(f"the {name} are read elsewhere too", outside[0] if outside else anchor)
    inputs = (_flattened(logits, dims(weight)[0]),)
    return Match("moe_gate", MOE_GATE, anchor, inputs, {"top_k": static_dim(weight, 1)}, (weight, expert))


def _between(value: ir.Value, border: ir.Value) -> Iterator[ir.Node]:
    stack, seen = [value], {value, border}
    while stack:
        node = stack.pop().producer()
        if node is None:
            continue
        yield node
        new = [v for v in node.inputs if v is not None and v not in seen]
        seen.update(new)
        stack += new


def _flattened(logits: ir.Value, tokens: Dim) -> Operand:
    """Logits [N, E], made of [B, T, E] where the graph has them so."""
    shape = dims(logits)
    if len(shape) == 2:
        return logits
    experts = shape[-1]
    assert isinstance(experts, int)

    def build(source: ir.Value) -> list[ir.Node]:
        target = ir.node("Constant", [], {"value_ints": [-1, experts]})
        return [target, ir.node("Reshape", [source, target.outputs[0]])]

    lead = [extent if isinstance(extent, int) else 1 for extent in shape[:-1]]
    if not isinstance(shape[1], int):
        lead[1] = -1
    dtype = logits.dtype or ir.DataType.FLOAT
    return Adapted(logits, dtype, (tokens, experts), build, lambda array: array.reshape(*lead, experts), "flattened")


def _best(logits_NE: Array, top_k: int) -> Array:
    """The op's experts in numpy."""
    return np.argsort(-logits_NE.astype(np.float64), axis=-1, kind="stable")[:, :top_k]


def _weights(logits_NE: Array, top_k: int) -> Array:
    """The op's weights in numpy."""
    return _softmax(np.take_along_axis(logits_NE, _best(logits_NE, top_k), -1))


def _softmax(logits: Array) -> Array:
    odds = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(odds / odds.sum(-1, keepdims=True))


def _close(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0) <= _SAME)


def _needs_more(anchor: ir.Node, logits: ir.Value, weights: list[ir.Value]) -> Refusal:
    leaves = dict.fromkeys(leaf for value in weights for leaf in data_leaves(value, [logits]) if leaf is not logits)
    names = ", ".join(repr(leaf.name) for leaf in leaves)
    reason = f"the experts are chosen by {logits.name!r}{_origin(logits)}, but the weights are made of more ({names})"
    return Refusal(reason, logits.producer() or anchor)


def _origin(value: ir.Value) -> str:
    node = value.producer()
    if node is None:
        return ""
    rounded = next((v.dtype for v in node.inputs if v is not None and v.dtype in _ROUNDED), None)
    return f", which comes from {node.op_type}" + (f" and was rounded to {rounded.name}" if rounded is not None else "")


def _other_experts(anchor: ir.Node, got: Runs, given: list[Array], first: int, experts: list[ir.Value]) -> Refusal:
    """Why none of the expert numbers are the op's."""
    for index, value in enumerate(experts):
        top_k = static_dim(value, 1)
        for arrays, x in zip(got, given, strict=True):
            distinct = [len(np.unique(row)) == len(row) for row in x]
            found = arrays[first + index]
            if any(distinct) and found.shape == (len(x), top_k) and (found == _best(x, top_k))[distinct].all():
                return Refusal("among experts with equal logits it does not take the lowest number first", anchor)
    return Refusal("it does not choose the experts with the largest logits, best first", anchor)


def _other_weights(
    logits: ir.Value, got: Runs, given: list[Array], weights: list[ir.Value], expert: ir.Value
) -> Refusal:
    """Why none of the weights are the op's, told by those that come nearest."""
    gaps: dict[ir.Value, tuple[bool, list[float], bool]] = {}
    top_k = static_dim(expert, 1)
    for index, value in enumerate(weights):
        pairs = [(arrays[index], x) for arrays, x in zip(got, given, strict=True)]
        if dims(value) == dims(expert):
            each = [float(np.nan_to_num(abs(found - _weights(x, top_k)), nan=np.inf).max()) for found, x in pairs]
            whole = _close(pairs[0][0].sum(-1), np.ones(len(pairs[0][0])))
            gaps[value] = not whole, each, all(_close(found, _shares(x, top_k)) for found, x in pairs)
    if not gaps:
        return Refusal(f"no weights are made for the {top_k} experts that are chosen", expert.producer())
    value = min(gaps, key=lambda value: gaps[value])  # one that sums to one, then by the spread logits, which are first
    gap, shares = max(gaps[value][1]), gaps[value][2]
    if shares:
        reason = "the weights are not renormalised: they are shares among all experts, not among the chosen"
    else:
        reason = f"the weights {value.name!r} are not the softmax over the best {top_k} of {logits.name!r}"
        reason += f"{_origin(logits)} ({f'off by {gap:.1e}' if np.isfinite(gap) else 'not a number for some logits'})"
    return Refusal(reason, value.producer())


def _shares(logits_NE: Array, top_k: int) -> Array:
    """The best probabilities of a softmax over all experts."""
    best = np.take_along_axis(_softmax(logits_NE), _best(logits_NE, top_k), -1)
    return np.asarray(best)


RULE = Rule("moe_gate", MOE_GATE, frozenset({("", "TopK")}), match)
