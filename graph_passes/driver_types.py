"""What passes between matchers, driver, prover and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from graph_passes.graph import Dim, Refusal, dims, scope
from graph_passes.ops.base import Attributes, PluginOp


@dataclass(frozen=True, slots=True)
class Adapted:
    """An op input that the graph holds in another form: another layout, or a mask of another kind.

    source: the value that the graph has. dtype, shape: of what the op gets.
    build: the nodes that make the op's input from `source`; the last one's only output is it. They are made when the
        graph is rewritten and not before, so that a match that fails leaves no reader behind.
    undo: numpy's way back, from an array for the op to one for `source`; the proof feeds both sides from it.
    how: a few words for reports, such as "transposed".
    """

    source: ir.Value
    dtype: ir.DataType
    shape: tuple[Dim, ...]
    build: Callable[[ir.Value], Sequence[ir.Node]]
    undo: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
    how: str


Operand = ir.Value | Adapted
"""What a match feeds into an op: a value as it is, or one that has to be brought into the op's form first."""


def source_of(operand: Operand) -> ir.Value:
    """The value of the graph behind an operand."""
    return operand.source if isinstance(operand, Adapted) else operand


def shape_of(operand: Operand) -> tuple[Dim, ...]:
    """The shape that the op sees; refuses a value of unknown rank."""
    return operand.shape if isinstance(operand, Adapted) else dims(operand)


def as_fed(operand: Operand, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array for the graph's value from which the op gets `array`."""
    return operand.undo(array) if isinstance(operand, Adapted) else array


@dataclass(frozen=True, slots=True)
class Match:
    """A place where a rule applies: everything that the rewrite needs, found without changing the graph.

    anchor: the node that the matcher started from; the new node takes its place.
    inputs: existing values in the order of the op's, each as it is or adapted. outputs: existing values.

    Raises Refusal when the values' shapes are not those that the op's names carry: a value that the graph broadcasts
    (one row of cosines for the whole batch, one head for all) is not what the op takes, though its rank is right.
    """

    rule: str
    op: PluginOp
    anchor: ir.Node
    inputs: tuple[Operand, ...]
    attributes: Attributes
    outputs: tuple[ir.Value, ...]

    def __post_init__(self) -> None:
        if self.op.pointwise:
            self._check_pointwise()
            return
        extents: dict[str, Dim] = {"1": 1}
        names, values = (*self.op.inputs, *self.op.outputs), (*self.inputs, *self.outputs)
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            letters, shape = name.rpartition("_")[2], shape_of(value)
            found = source_of(value).name
            if self.op.rows and index in (0, len(self.op.inputs)):  # weights have no axes before theirs
                shape = shape[-len(letters) :]
            if len(letters) != len(shape):
                raise Refusal(f"{found!r} has {len(shape)} axes where {name} is needed", self.anchor)
            for letter, extent in zip(letters, shape, strict=True):
                if extents.setdefault(letter, extent) != extent:
                    reason = f"{letter} is {extent} in {found!r} ({name}) and {extents[letter]} elsewhere"
                    raise Refusal(reason, self.anchor)
        if self.op.rows and shape_of(self.inputs[0])[:-1] != shape_of(self.outputs[0])[:-1]:
            raise Refusal("the axes before the last are not those of the input", self.anchor)

    def _check_pointwise(self) -> None:
        shapes = [shape_of(value) for value in (*self.inputs, *self.outputs)]
        if any(shape != shapes[0] for shape in shapes):
            raise Refusal(f"the shapes {shapes} are not one", self.anchor)

    @property
    def sources(self) -> tuple[ir.Value, ...]:
        """The graph's values behind the inputs, in order."""
        return tuple(source_of(operand) for operand in self.inputs)

    @property
    def place(self) -> str:
        """Rule and module path, for messages."""
        return f"{self.rule} in {scope(self.anchor) or 'the model'} (at {self.anchor.op_type} {self.anchor.name!r})"


@dataclass(frozen=True, slots=True)
class Rule:
    """A fusion. `match` raises `Refusal` where the anchor does not turn out to be the pattern.

    anchors: (domain, op_type) of the nodes that a match can start from.
    prepare: rewrites the graph by an identity of the standard operators, before anything is matched.
    """

    name: str
    op: PluginOp
    anchors: frozenset[tuple[str, str]]
    match: Callable[[ir.Model, ir.Node], Match]
    prepare: Callable[[ir.Model], None] | None = None


@dataclass(frozen=True, slots=True)
class FusionRecord:
    """One rewrite that happened.

    replaced: names of the nodes that the region computed with and that nothing else needed.
    replaced_ops: how many of them there were of each operator.
    error: largest relative difference found by the proof, or None when the proof was switched off.
    precision: of the proof, "float64" or "float32"; None as well.
    """

    rule: str
    op: str
    scope: str
    node: str
    replaced: tuple[str, ...]
    replaced_ops: Mapping[str, int]
    attributes: Attributes
    error: float | None
    precision: str | None


@dataclass(frozen=True, slots=True)
class RefusalRecord:
    """One anchor at which a rule did not apply, and why.

    distance: nodes between the anchor and the one where the walk broke; the larger, the nearer to a match.
    source: the line of the traced program that made that node, empty when the tracer left none.
    """

    rule: str
    scope: str
    anchor: str
    reason: str
    distance: int
    source: str

    def __str__(self) -> str:
        went = f", {self.distance} nodes on," if self.distance else ""
        line = f" (written as: {self.source})" if self.source else ""
        return f"from {self.anchor} in {self.scope or 'the model'}{went} {self.reason}{line}"
