"""Experts: whatever is computed from a router's weights and expert numbers, and is a sum over gated units, is one node.

The spelling does not matter: all experts on all tokens times mostly zero weights, matrices gathered for each choice,
or a loop over the experts. The region's borders are found by flow (`moe_region`), its activations by running them
(`moe_activations`); which matrix plays which part is settled by shape and, where that leaves a choice, by trial.

Right because of what may lie inside: rearrangements, sums and products, choices by expert number, and activations. For
each way to choose experts, the region is then a polynomial in tokens, weights, matrices and activated values, and two
polynomials that agree at random points are equal with probability one. The examples go through every expert in every
place. Experts that a token did not choose are not computed for it by the op; a program that multiplies them by zero
instead differs only where such an expert overflows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.driver_types import Adapted, Match, Operand, Rule, as_fed, shape_of
from graph_passes.fuse.moe_activations import find_activation
from graph_passes.fuse.moe_region import PRODUCTS, Area, find_area, refuse_choices
from graph_passes.fuse.walk import back, only_reader
from graph_passes.graph import Refusal, dims, is_made_by, operand, scalar
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.moe_gate import MOE_GATE
from graph_passes.prove import first_that_holds
from graph_passes.region import Region

_SMALL = 1 << 16
"""Numbers in a stack of matrices up to which a region is run to find out what is wrong with it."""


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the gate, or from a scatter of weights where there is none, to the sum over experts and back."""
    weight, expert = _routing(anchor)
    area = find_area(model, weight, expert, _routed(anchor))
    refuse_choices(area)
    x = _tokens(area)
    activation, gates = find_activation(model, area)
    try:
        return first_that_holds(model, _readings(area, (x, weight, expert), activation, gates))
    except Refusal as refusal:
        end = area.y.producer()
        if (why := _wrong_degree(model, area, x, weight, expert)) is not None:
            raise Refusal(why, end) from refusal
        raise Refusal(refusal.reason, end) from refusal


def _routing(anchor: ir.Node) -> tuple[ir.Value, ir.Value]:
    """(weight [N, K], expert [N, K]), the weight after constant factors that all of it takes."""
    if anchor.op_type == MOE_GATE.name:
        weight, expert = anchor.outputs
    else:
        weight, expert = back(operand(anchor, 2))[-1].value, back(operand(anchor, 1))[-1].value
        if is_made_by(weight, "Mul", "Div") or len(dims(weight)) != 2 or dims(weight) != dims(expert):
            raise Refusal("not a scatter of weights [N, K] by expert numbers [N, K]", anchor)
        maker = expert.producer()
        if maker is not None:
            at_gate = "the match begins at their MoEGate" if maker.op_type == MOE_GATE.name else "which is no MoEGate"
            raise Refusal(f"the expert numbers come from {maker.op_type}; {at_gate}", maker)
    while (scaled := _scaled(weight)) is not None:
        weight = scaled
    return weight, expert


def _routed(anchor: ir.Node) -> frozenset[ir.Value]:
    """What a gate's router multiplies with its matrix, in each of its shapes; nothing where there is no gate."""
    product = back(operand(anchor, 0))[-1].value.producer() if anchor.op_type == MOE_GATE.name else None
    if product is None or product.op_type not in PRODUCTS:
        return frozenset()
    factors = [v for v in product.inputs if v is not None]
    return frozenset(step.value for v in factors for step in back(v) if step.factor == 1.0)


def _scaled(weight: ir.Value) -> ir.Value | None:
    """`weight` times a constant number, if that is all that reads it."""
    reader = only_reader(weight)
    if reader is None or reader.domain != "" or reader.op_type not in ("Mul", "Div"):
        return None
    other = reader.inputs[1] if reader.inputs[0] is weight else reader.inputs[0]
    divides_it = reader.op_type == "Div" and reader.inputs[0] is not weight
    return None if scalar(other) is None or divides_it else reader.outputs[0]


def _tokens(area: Area) -> Operand:
    """The value [N, C] that the experts read.

    Raises Refusal when they read another, or when something else goes into the sum.
    """
    found: dict[ir.Value, Operand] = {}
    others: list[tuple[ir.Value, tuple[ir.Node, ...]]] = []
    for root, readers in area.roots.items():
        tokens = _behind(root, area)
        if tokens is None or not _is_multiplied(root, area):
            others.append((root, readers))
        else:
            found.setdefault(tokens if isinstance(tokens, ir.Value) else tokens.source, tokens)
    for root, readers in others:
        _refuse_other(root, readers[0], area)
    if len(found) > 1:
        names = " and ".join(repr(str(v.name)) for v in found)
        raise Refusal(f"the experts read {names}, but must all read the same tokens", area.y.producer())
    if not found:
        raise Refusal("the experts read no tokens [N, C]", area.y.producer())
    return next(iter(found.values()))


def _behind(root: ir.Value, area: Area) -> Operand | None:
    """The tokens of which `root` is a rearrangement, as [N, C]; None when it is something else."""
    value: ir.Value | None = root
    wide: ir.Value | None = None
    while value is not None:
        if value.shape is not None and dims(value) == dims(area.y):
            return value
        if value.shape is not None and len(dims(value)) == 3 and dims(value)[-1] == dims(area.y)[-1] and wide is None:
            factors = str(dims(area.y)[0]).split("*")
            wide = value if sorted(map(str, dims(value)[:2])) == sorted(factors) else None
        node = value.producer()
        if node is None:
            break
        steps = back(value)
        if len(steps) > 1 and steps[1].factor == 1.0:
            value = steps[1].value
        elif node.op_type == "Gather" and node.inputs[1] not in area.roots:
            value = node.inputs[0]
        else:
            value = None
    return None if wide is None else _flattened(wide, area)


def _flattened(x_BTC: ir.Value, area: Area) -> Adapted:
    """Tokens [B, T, C] as [N, C]. The nodes hold no size, since a twin's are made for the large model as well."""

    def build(value: ir.Value) -> Sequence[ir.Node]:
        return [ir.node("Flatten", [value], {"axis": 2})]

    dtype = x_BTC.dtype or ir.DataType.FLOAT
    return Adapted(x_BTC, dtype, dims(area.y), build, lambda array: array[None], "flattened")


def _is_multiplied(root: ir.Value, area: Area) -> bool:
    """Whether what is made of `root` alone goes into products only, as tokens do."""
    return all(reader.op_type in PRODUCTS or reader.op_type == "Mul" for reader in area.roots[root])


def _refuse_other(root: ir.Value, reader: ir.Node, area: Area) -> None:
    experts = {dims(stack)[0] for stack in area.matrices}
    if root.producer() is None and len(dims(root)) == 2 and dims(root)[0] in experts and _static(root):
        reason = f"the experts have a bias, {root.name!r} {list(dims(root))}, and MixtureOfExperts has none"
        raise Refusal(reason, reader)
    if reader.op_type in ("Add", "Sub", "Sum") and root.shape is not None and dims(root) == dims(area.y):
        raise Refusal(
            f"{root.name!r} is added among the experts (a shared expert?); add it to their sum instead", reader
        )
    raise Refusal(
        f"the experts also read {root.name!r} {list(dims(root))}, which is neither tokens nor routing", reader
    )


def _static(value: ir.Value) -> bool:
    return all(isinstance(extent, int) for extent in dims(value))


def _readings(
    area: Area, routing: tuple[Operand, ir.Value, ir.Value], activation: str, gates: frozenset[ir.Value]
) -> Iterator[Match]:
    """Every assignment of the three stacks that their shapes allow; those in the op's own layout come first."""
    end = area.y.producer()
    assert end is not None
    stacks = area.matrices
    if len(stacks) != 3:
        raise Refusal(_why_not_three(area), end)
    readings = []
    for gate, up, down in itertools.permutations(stacks):
        if gate not in gates:
            continue
        for turned in itertools.product((False, True), repeat=3):
            operands = [_turned(v) if turn else v for v, turn in zip((gate, up, down), turned, strict=True)]
            shapes = [shape_of(value) for value in operands]
            E, I, C = shapes[0]
            if dims(area.y)[1] == C and shapes == [(E, I, C), (E, I, C), (E, C, I)]:
                readings.append((sum(turned), operands))
    if not readings:
        listed = ", ".join(f"{v.name!r} {list(dims(v))}" for v in stacks)
        raise Refusal(f"the matrices should be [E, I, C], [E, I, C] and [E, C, I], but are {listed}", end)
    for _, operands in sorted(readings, key=lambda reading: reading[0]):
        attributes = {"activation": activation}
        yield Match("moe", MIXTURE_OF_EXPERTS, end, (*routing, *operands), attributes, (area.y,))


def _why_not_three(area: Area) -> str:
    stacks = area.matrices
    listed = ", ".join(f"{v.name!r} {list(dims(v))}" for v in stacks)
    extents = [{int(extent) for extent in dims(stack)[1:]} for stack in stacks]
    if len(stacks) == 2 and any(2 * inner in a for a, b in (extents, extents[::-1]) for inner in b):
        return (
            f"gate and up lie in one weight ({listed}); make it a Concat of two weights [E, I, C] over axis 1, so that "
            "the op can read each"
        )
    return f"an expert has three matrices, gate, up and down, but here are {len(stacks)} stacks: {listed}"


def _turned(value: ir.Value) -> Adapted:
    """A stack [E, a, b] as [E, b, a]."""
    E, a, b = dims(value)

    def build(source: ir.Value) -> Sequence[ir.Node]:
        return [ir.node("Transpose", [source], {"perm": [0, 2, 1]})]

    dtype = value.dtype or ir.DataType.FLOAT
    return Adapted(value, dtype, (E, b, a), build, lambda array: array.transpose(0, 2, 1).copy(), "transposed")


def _wrong_degree(model: ir.Model, area: Area, x: Operand, weight: ir.Value, expert: ir.Value) -> str | None:
    """Why the sum does not grow with the weights as it should, in words; None when it does or cannot be run."""
    sources = [x.source if isinstance(x, Adapted) else x, weight, expert, *area.matrices]
    C, K = dims(area.y)[1], dims(weight)[1]
    sizes = [extent for stack in area.matrices for extent in dims(stack)]
    if not isinstance(C, int) or not isinstance(K, int) or math.prod(map(int, sizes[:3])) > _SMALL:
        return None
    rng = np.random.default_rng(0)
    tokens = as_fed(x, rng.standard_normal((3, C), dtype=np.float32))
    weights = rng.random((3, K), dtype=np.float32) + np.float32(0.1)
    chosen = np.tile(np.arange(K, dtype=np.int64), (3, 1))
    stacks = [rng.standard_normal([int(d) for d in dims(v)], dtype=np.float32) for v in area.matrices]
    try:
        region = Region(model, sources, [area.y])
        once, twice = (_run(region, [tokens, factor * weights, chosen, *stacks]) for factor in (1, 2))
    except Refusal:
        return None
    size = float(np.abs(once).max())
    for factor, why in ((4, "the router's weights are applied twice"), (1, "the router's weights are not applied")):
        if np.abs(twice - factor * once).max() <= 1e-4 * size:
            return why
    return None


def _run(region: Region, arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.asarray(region.run([a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays])[0])


RULE = Rule("moe", MIXTURE_OF_EXPERTS, frozenset({("cierzo", MOE_GATE.name), ("", "ScatterElements")}), match)
