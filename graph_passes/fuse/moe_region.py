"""The borders of the experts' region: from the router's weights forward to the sum, and back to tokens and matrices.

Forward: everything that is computed from weights and expert numbers flows through one value in the end; the first such
value of the tokens' shape that has matrices behind it is the experts' sum. Back from there only operators of known
effect are passed: rearrangements, sums and products, choices by expert number, and the elementwise functions that an
activation is made of. What the walk ends at must be weights and expert numbers, matrices, and one value of tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.fuse.walk import REARRANGEMENTS, data_inputs
from graph_passes.graph import Dim, Refusal, constant, dims
from graph_passes.unbound import is_unbound

PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
SUMS = frozenset({"Mul", "Add", "Sub", "Neg", "Div", "ReduceSum", "Sum"})
CHOICES = frozenset({"GatherND", "ScatterElements", "OneHot", "Equal", "Where", "Not", "And", "Or"})
SHAPES = frozenset({"Shape", "Size", "Range", "ConstantOfShape"})
FUNCTIONS = frozenset(
    {"Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Swish", "Exp", "Pow", "Softplus", "HardSigmoid", "HardSwish"}
    | {"Elu", "LeakyRelu", "Mish", "Celu", "Selu", "Abs", "Sqrt", "Log", "Reciprocal", "Clip", "Max", "Min"}
    | {"Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
)
"""Functions of single elements; each must belong to an activation, which is recognised by running it."""

_KNOWN = REARRANGEMENTS | PRODUCTS | SUMS | CHOICES | SHAPES | FUNCTIONS

_EXPLANATIONS = {
    "Softmax": "it is no function of single elements, and so no activation",
    "CumSum": "are tokens counted to drop those beyond an expert's capacity? Every token must reach its experts",
    "TopK": "are tokens dropped or chosen a second time? Every token must reach its experts",
    "NonZero": "the tokens of an expert are picked by their number, which depends on data; trace the dense form",
    "Dropout": "trace the model in evaluation mode",
}


@dataclass(frozen=True, slots=True)
class Area:
    """What lies between the borders.

    y: the experts' sum [N, C]. nodes: in no order. matrices: the stacks [E, ., .] that are read. roots: what is
    neither routing nor made of matrices, with the nodes that read it. inside: values that depend on routing or
    matrices. unknown: operators at which the walk ended because it does not know them.
    """

    y: ir.Value
    nodes: tuple[ir.Node, ...]
    matrices: tuple[ir.Value, ...]
    roots: dict[ir.Value, tuple[ir.Node, ...]]
    inside: frozenset[ir.Value]
    unknown: tuple[ir.Node, ...]


def find_area(model: ir.Model, weight: ir.Value, expert: ir.Value, routed: Collection[ir.Value]) -> Area:
    """The region of the experts that `weight` [N, K] and `expert` [N, K] lead to.

    routed: what the router reads, in each of its shapes; nothing behind it is looked at.

    Raises Refusal when no value of the tokens' shape collects all that is made of them.
    """
    tokens = dims(weight)[0]
    last: ir.Value | None = None
    for value in _cuts(model, weight, expert):
        shape = dims(value) if value.shape is not None else ()
        if value.dtype is None or not value.dtype.is_floating_point() or shape == dims(weight):
            continue
        area = _area(value, weight, expert, routed)
        _refuse_unknown_operators(area)
        if not area.matrices:
            last = value if len(shape) == 2 else last
            continue
        if len(shape) != 2 or shape[0] != tokens:
            if _is_sum_of_tokens(area, shape):
                raise Refusal(
                    f"the experts' sum {value.name!r} is laid out as {list(shape)}; reshape the tokens to [N, C] "
                    "before the experts and back after them",
                    value.producer(),
                )
            continue
        return area
    if last is not None:
        _refuse_single_experts(_area(last, weight, expert, routed))
    raise Refusal(
        f"no value [{tokens}, C] was found that is made of stacks of expert matrices [E, I, C] and through which all "
        f"that reads {weight.name!r} and {expert.name!r} flows",
        weight.producer(),
    )


def _is_sum_of_tokens(area: Area, shape: tuple[Dim, ...]) -> bool:
    """Whether all matrices of the region came together: after the product with the last of them."""
    return len(area.matrices) == 3 and len(shape) == 3 and not any(isinstance(extent, int) for extent in shape[:2])


def _cuts(model: ir.Model, weight: ir.Value, expert: ir.Value) -> Iterator[ir.Value]:
    """Values through which everything flows that is computed from the two, nearest first.

    Nodes stand in the order of computation, so that such a value is the only one that is still to be read just after
    its producer. Who asks for a shape does not count.
    """
    found, made = 0, {weight, expert}
    waiting = {value: readers for value in made if (readers := _readers(value))}
    for node in model.graph:
        inputs = {v for v in node.inputs if v is not None and v in made}
        if not inputs or node.op_type in ("Shape", "Size"):
            continue
        for value in inputs:
            waiting[value] -= 1
            if not waiting[value]:
                waiting.pop(value)
        made.update(node.outputs)
        waiting.update({value: readers for value in node.outputs if (readers := _readers(value))})
        if len(waiting) == 1:
            found += 1
            (value,) = waiting
            yield value
            if value.is_graph_output() or found >= _MOST_CUTS:
                return


_MOST_CUTS = 24
"""Values that are tried as the experts' sum, so that the work does not grow with the layers after them."""


def _readers(value: ir.Value) -> int:
    readers = {use.node for use in value.uses() if use.node.op_type not in ("Shape", "Size")}
    return len(readers) + value.is_graph_output()


def is_matrix(value: ir.Value, rank: int) -> bool:
    """Whether `value` is given, a weight or an input of the graph, with `rank` axes of fixed size."""
    given = value.producer() is None and (is_unbound(value) or value.const_value is None)
    return given and value.shape is not None and len(value.shape) == rank and value.shape.is_static()


def _is_stack(value: ir.Value) -> bool:
    """A parameter [E, ., .], or one joined from matrices [., .] of single experts."""
    if is_matrix(value, 3):
        return True
    node = value.producer()
    if node is None or node.op_type != "Concat" or value.shape is None or len(value.shape) != 3:
        return False
    return all(v is not None and _lifted(v) for v in node.inputs)


def _lifted(value: ir.Value) -> bool:
    """Whether `value` is a matrix of one expert with an axis before it."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type in ("Unsqueeze", "Reshape") else None
    return source is not None and is_matrix(source, 2)


def _area(y: ir.Value, weight: ir.Value, expert: ir.Value, routed: Collection[ir.Value]) -> Area:
    """Walk back from `y` and sort what is found; stops at whatever is not known, which is then a root."""
    order: list[ir.Value] = []
    seen, stack = set[ir.Value](), [(y, False)]
    ends = set[ir.Value]()
    while stack:
        value, done = stack.pop()
        if done:
            order.append(value)
            continue
        if value in seen:
            continue
        seen.add(value)
        stack.append((value, True))
        node = value.producer()
        known = node is not None and node.domain in ("", "ai.onnx") and node.op_type in _KNOWN
        if value in (weight, expert) or node is None or not known or value in routed or _is_stack(value):
            ends.add(value)
            continue
        if node.op_type in ("Shape", "Size"):
            continue
        stack.extend((v, False) for v in node.inputs if v is not None and v not in seen and constant(v) is None)
    matrices = tuple(v for v in order if v in ends and v not in (weight, expert) and _is_stack(v))
    inside = {weight, expert, *matrices}
    with_data = set(ends)
    for value in order:
        node = value.producer()
        if value in ends or node is None or node.op_type in ("Shape", "Size"):
            continue
        if any(v in inside for v in node.inputs):
            inside.add(value)
        if any(v in with_data for v in node.inputs):
            with_data.add(value)
    nodes = dict.fromkeys(v.producer() for v in order if v in inside and v not in ends)
    region = tuple(node for node in nodes if node is not None)
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in region:
        for behind in node.inputs:
            if behind is not None and behind in with_data and behind not in inside:
                readers.setdefault(behind, []).append(node)
    makers = [v.producer() for v in order if v in ends and v not in inside and v not in routed]
    unknown = tuple(node for node in makers if node is not None and node.domain in ("", "ai.onnx"))
    return Area(y, region, matrices, {v: tuple(nodes) for v, nodes in readers.items()}, frozenset(inside), unknown)


def _refuse_unknown_operators(area: Area) -> None:
    """Refuses operators that a sum over experts does not have."""
    for node in area.unknown:
        if not _reaches_inside(node, area):
            continue
        more = f" ({_EXPLANATIONS[node.op_type]})" if node.op_type in _EXPLANATIONS else ""
        raise Refusal(f"{node.op_type} has no place among the experts{more}", node)


def refuse_choices(area: Area) -> None:
    """Refuses choices that are not made by expert number, and weights that experts have though they were not chosen."""
    for node in area.nodes:
        left = node.inputs[0]
        if node.op_type == "ScatterElements":
            _check_scatter(node)
        floating = left is not None and left.dtype is not None and left.dtype.is_floating_point()
        whole = node.outputs[0].dtype is not None and node.outputs[0].dtype.is_integer()
        if node.op_type == "Equal" and floating and not any(_is_zero(v) for v in node.inputs if v is not None):
            raise Refusal("a float is compared with something that is not zero", node)
        if node.op_type == "Cast" and floating and whole:
            raise Refusal("a float is rounded to a whole number", node)
        _refuse_places(node, area)


def _refuse_places(node: ir.Node, area: Area) -> None:
    """Refuses what makes a difference between tokens by their place, or by how many there are.

    A few tokens prove nothing about the place 1,000. What is made of shapes alone may fill with a number and count
    tokens up for a choice of rows, and no more.
    """
    if node.op_type in ("Slice", "Split") and any(a != b for a, b in _open_extents(node)):
        raise Refusal("tokens are taken apart by their place", node)
    seen = {v for v in data_inputs(node) if v not in area.inside and v not in area.roots and constant(v) is None}
    front = list(seen)
    while front:
        value = front.pop()
        maker = value.producer()
        if maker is None or maker.op_type in ("Shape", "Size", "ConstantOfShape"):
            continue
        counts = maker.op_type == "Range" and value.shape is not None and not value.shape.is_static()
        whole = value.dtype is not None and value.dtype.is_integer()
        rounds = whole and (maker.op_type == "Div" or (maker.op_type == "Cast" and not _is_whole(maker.inputs[0])))
        if rounds or (counts and node.op_type in CHOICES - {"GatherND"}) or maker.op_type in FUNCTIONS | CHOICES:
            raise Refusal("what a token gets depends on its place, or on the number of tokens", maker)
        more = [v for v in data_inputs(maker) if v not in seen and constant(v) is None]
        seen.update(more)
        front.extend(more)


def _open_extents(node: ir.Node) -> Iterator[tuple[Dim, Dim]]:
    """Extents before and after `node`, where those before depend on the number of tokens."""
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None:
        return
    for a, b in zip(dims(before), dims(after), strict=True):
        if not isinstance(a, int):
            yield a, b


def _is_whole(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_integer()


def _reaches_inside(node: ir.Node, area: Area) -> bool:
    """Whether weights, expert numbers or matrices lie behind an operator at which the walk ended."""
    seen, front = set[ir.Node](), [node]
    while front and len(seen) < 200:
        current = front.pop()
        if current in seen:
            continue
        seen.add(current)
        for value in current.inputs:
            if value is None:
                continue
            if value in area.inside or _is_stack(value):
                return True
            producer = value.producer()
            if producer is not None and producer.domain in ("", "ai.onnx"):
                front.append(producer)
    return False


def _check_scatter(node: ir.Node) -> None:
    """Experts are distinct within a token, so that adding to zero is the same as replacing it; nothing else is."""
    attribute = node.attributes.get("reduction")
    if attribute is not None and attribute.as_string() not in ("none", "add"):
        raise Refusal(f"the scatter reduces ({attribute.as_string()}) instead of replacing", node)
    ground = node.inputs[0]
    if ground is not None and not _is_zero(ground):
        raise Refusal("experts that were not chosen have a weight other than zero", node)


def _is_zero(value: ir.Value) -> bool:
    """Whether a constant, or what Expand or ConstantOfShape fills, is all zeros."""
    node = value.producer()
    if node is not None and node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill is None or not fill.as_tensor().numpy().any()
    data = constant(node.inputs[0] if node is not None and node.op_type == "Expand" else value)
    return data is not None and not data.any()


def _refuse_single_experts(area: Area) -> None:
    """Refuses a sum over experts that each have parameters of their own."""
    seen, front, found = set[ir.Value](), list(area.roots), list[ir.Value]()
    while front and len(seen) < 400:
        value = front.pop()
        if value in seen:
            continue
        seen.add(value)
        if is_matrix(value, 2):
            found.append(value)
        node = value.producer()
        if node is not None and node.domain == "" and node.op_type in _KNOWN:
            front.extend(v for v in node.inputs if v is not None)
    if len(found) > 3:
        raise Refusal(
            f"each expert has matrices of its own ({found[0].name!r} and {len(found) - 1} more); the op reads stacks, "
            "so keep the experts' matrices in three parameters [E, I, C], [E, I, C] and [E, C, I]",
            area.y.producer(),
        )
