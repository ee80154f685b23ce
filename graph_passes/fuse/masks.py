"""What hides scores before a softmax: which bool value decides it, and that hidden scores keep no weight at all.

A mask is chosen (Where) or added. A chosen one names its bool value. An added one is followed back through elementwise
operators to the bool values that it is made of, and then run with each of them true and false: a function of bools is
known completely from that, so its values are verified and not sampled. What is made of anything else has values that
cannot be known, or is a bias, and is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.driver_types import Adapted, Operand
from graph_passes.fuse.walk import REARRANGEMENTS, back, cone, uniform
from graph_passes.graph import Dim, Refusal, constant, dims, is_made_by, operand
from graph_passes.region import Region

LOWEST_SCORE = -1e9
"""A mask of this or less hides a score; -10000 does not, since real scores may come near it."""

_STILL_LOW = -1e6
"""What scaling after the mask must leave: exp of this, less any ordinary maximum, is zero in every precision."""

_ELEMENTWISE = REARRANGEMENTS | {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Neg",
    "Log",
    "Where",
    "And",
    "Or",
    "Not",
    "Xor",
    "Max",
    "Min",
}
"""Operators through which an added mask is followed to its bool values."""

_REPEATS = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Tile", "Identity", "Slice", "Cast"})
"""Rearrangements of one value that a mask may take on its way to the scores."""

_MOST_BOOLS = 4
"""A mask of more bool values is not run through all of their combinations."""


@dataclass(frozen=True, slots=True)
class Mask:
    """One value that says which scores count.

    visible_when: the truth value of a bool that leaves a score visible; None for a float that is added. sign: of the
    float where it is added to the scores.
    """

    value: ir.Value
    visible_when: bool | None
    sign: float
    node: ir.Node

    def operand(self, rows: Dim, tokens: Dim, slots: Dim) -> Operand:
        """The op's `visible` [B, 1, T, S], from the nearest value of that shape, or of [B, 1, 1, T, S].

        Raises Refusal when there is none.
        """
        wanted: tuple[Dim, ...] = (rows, 1, tokens, slots)
        chain = list(self._chain())
        for shape in (wanted, (rows, 1, 1, tokens, slots)):
            for value, visible_when in sorted(chain, key=lambda found: found[1] is not True):
                if dims(value) == shape:
                    return self._adapted(value, visible_when, wanted)
        found = chain[-1][0]
        seen, needed = (", ".join(map(str, extents)) for extents in (dims(found), wanted))
        reason = "of its own for each row, the same for all heads"
        raise Refusal(f"the mask {found.name!r} is [{seen}], but must be [{needed}]: {reason}", self.node)

    def _chain(self) -> Iterator[tuple[ir.Value, bool | None]]:
        """The mask and what it repeats, rearranges or negates, nearest first."""
        if self.visible_when is None:
            yield from ((step.value, None) for step in back(self.value) if step.factor > 0)
            return
        value, visible_when = self.value, self.visible_when
        while True:
            yield value, visible_when
            node = value.producer()
            if node is None or node.domain != "" or value.dtype != ir.DataType.BOOL:
                return
            if node.op_type == "Not":
                visible_when = not visible_when
            elif node.op_type not in _REPEATS - {"Cast"} or not uniform(node):
                return
            value = operand(node, 0)

    def _adapted(self, value: ir.Value, visible_when: bool | None, wanted: tuple[Dim, ...]) -> Operand:
        rank = len(dims(value))
        if visible_when and rank == 4:
            return value
        return Adapted(
            value, ir.DataType.BOOL, wanted, _builder(rank, visible_when), self._undo(rank, visible_when), "made bool"
        )

    def _undo(self, rank: int, visible_when: bool | None) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
        def undo(visible: npt.NDArray[Any]) -> npt.NDArray[Any]:
            if rank == 5:
                visible = visible[:, None]
            if visible_when is None:
                return np.where(visible, np.float32(0), np.float32(math.copysign(1e30, -self.sign)))
            return visible if visible_when else ~visible

        return undo


def _builder(rank: int, visible_when: bool | None) -> Callable[[ir.Value], Sequence[ir.Node]]:
    def build(source: ir.Value) -> list[ir.Node]:
        nodes: list[ir.Node] = []

        def add(op_type: str, *inputs: ir.Value, **attributes: Any) -> None:
            nodes.append(ir.node(op_type, [nodes[-1].outputs[0] if nodes else source, *inputs], attributes))

        if visible_when is None:  # zero is visible, anything else is hidden
            add("Cast", to=ir.DataType.BOOL.value)
        if not visible_when:
            add("Not")
        if rank == 5:
            axis = ir.node("Constant", [], {"value_ints": [1]})
            add("Squeeze", axis.outputs[0])
            nodes.insert(0, axis)
        return nodes

    return build


def chosen(node: ir.Node, factor: float) -> tuple[ir.Value, Mask]:
    """(scores, mask) of a Where that puts a very low number in the place of hidden scores.

    factor: what the result is multiplied by before the softmax. Raises Refusal when the number is not low enough.
    """
    condition, yes, no = (operand(node, index) for index in range(3))
    for scores, fill, visible_when in ((yes, no, True), (no, yes, False)):
        if (low := filled(fill)) is not None and filled(scores) is None:
            _check_low(low, factor, node)
            return scores, Mask(condition, visible_when, 1.0, node)
    raise Refusal("neither choice of the mask is a constant number, so that hidden scores could keep weight", node)


def added(model: ir.Model, value: ir.Value, factor: float, node: ir.Node) -> Mask:
    """The mask that adds `factor` times `value` to the scores before the softmax; refuses what is no mask."""
    ends = cone(value, _ELEMENTWISE, stop=lambda v: v.dtype == ir.DataType.BOOL).ends
    bools = [end for end in ends if end.dtype == ir.DataType.BOOL]
    for end in ends:
        if end not in bools and not is_made_by(end, "ConstantOfShape"):
            raise _unknown(end, node)
    if not 1 <= len(bools) <= _MOST_BOOLS:
        raise Refusal(f"the added mask is made of {len(bools)} bool values instead of one", node)
    region = Region(model, bools, [value])
    seen: dict[tuple[bool, ...], bool] = {}
    for truths in itertools.product((True, False), repeat=len(bools)):
        (got,) = region.run([np.full(_extents(b), truth) for b, truth in zip(bools, truths, strict=True)])
        seen[truths] = _is_visible(got, factor, node)
    if len(bools) > 1:
        _check_mixtures(region, bools, factor, node)
    if len(set(seen.values())) < 2:
        raise Refusal("the added mask hides everything or nothing", node)
    if len(bools) == 1:
        return Mask(bools[0], seen[True,], 1.0, node)
    return Mask(value, None, math.copysign(1.0, factor), node)


def filled(value: ir.Value) -> float | None:
    """The number that a constant, or an Expand or ConstantOfShape of one, holds everywhere; None when it is no such."""
    while is_made_by(value, *_REPEATS):
        producer = value.producer()
        assert producer is not None
        value = operand(producer, 0)
    data = constant(value)
    if is_made_by(value, "ConstantOfShape"):
        producer = value.producer()
        assert producer is not None
        fill = producer.attributes.get("value")
        data = np.zeros(1) if fill is None else np.asarray(fill.as_tensor().numpy())
    if data is None or data.size == 0 or data.dtype == np.bool_ or not (data == data.reshape(-1)[0]).all():
        return None
    return float(data.reshape(-1)[0])


def _is_visible(added_values: npt.NDArray[Any], factor: float, node: ir.Node) -> bool:
    if not added_values.any():
        return True
    sign = math.copysign(1.0, factor)
    highest = float((sign * added_values).max())
    _check_low(highest, abs(factor), node)
    return False


def _check_mixtures(region: Region, bools: Sequence[ir.Value], factor: float, node: ir.Node) -> None:
    """Refuses a mask of several bools that is neither zero nor very low somewhere when they differ along their axes."""
    rng = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.5, 0.8):
        (got,) = region.run([rng.random(_extents(b, 5)) < share for b in bools])
        if (hidden := got[got != 0]).size:
            _check_low(float((math.copysign(1.0, factor) * hidden).max()), abs(factor), node)


def _check_low(low: float, factor: float, node: ir.Node) -> None:
    if not (low <= LOWEST_SCORE and low * factor <= _STILL_LOW):
        raise Refusal(
            f"masked scores are {low:g}{f' times {factor:g}' if factor != 1 else ''}, which leaves them some weight: "
            f"a real score may come near it, so only {LOWEST_SCORE:g} or lower is taken for a mask",
            node,
        )


def _unknown(end: ir.Value, node: ir.Node) -> Refusal:
    producer = end.producer()
    bias = "a bias, such as relative positions or ALiBi, and not a mask of zeros and very low numbers"
    if end.dtype is not None and not end.dtype.is_floating_point():
        return Refusal(f"what is added to the scores is computed from integers ({end.name!r}): {bias}", node)
    if producer is None:
        return Refusal(
            f"what is added to the scores comes from outside as float values ({end.name!r}), which cannot be known: "
            "it may be a mask or a bias. Give the mask as bool, or compute it from positions",
            node,
        )
    return Refusal(
        f"what is added to the scores is computed from {end.name!r} (by {producer.op_type}): {bias}", producer
    )


def _extents(value: ir.Value, size: int = 2) -> list[int]:
    """Sizes to run a mask with: what is fixed stays, every open extent is `size`."""
    return [extent if isinstance(extent, int) else size for extent in dims(value)]
