"""What passes between matchers, driver, prover and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.graph import Dim, Refusal, dims, scope
from graph_passes.ops.base import Attributes, PluginOp


@dataclass(frozen=True, slots=True)
class Match:
    """A place where a rule applies: everything that the rewrite needs, found without changing the graph.

    anchor: the node that the matcher started from; the new node takes its place.
    inputs, outputs: existing values, in the order of the op's.

    Raises Refusal when the values' shapes are not those that the op's names carry: a value that the graph broadcasts
    (one row of cosines for the whole batch, one head for all) is not what the op takes, though its rank is right.
    """

    rule: str
    op: PluginOp
    anchor: ir.Node
    inputs: tuple[ir.Value, ...]
    attributes: Attributes
    outputs: tuple[ir.Value, ...]

    def __post_init__(self) -> None:
        extents: dict[str, Dim] = {"1": 1}
        names, values = (*self.op.inputs, *self.op.outputs), (*self.inputs, *self.outputs)
        for name, value in zip(names, values, strict=True):
            letters, shape = name.rpartition("_")[2], dims(value)
            if len(letters) != len(shape):
                raise Refusal(f"{value.name!r} has {len(shape)} axes where {name} is needed", self.anchor)
            for letter, extent in zip(letters, shape, strict=True):
                if extents.setdefault(letter, extent) != extent:
                    reason = f"{letter} is {extent} in {value.name!r} ({name}) and {extents[letter]} elsewhere"
                    raise Refusal(reason, self.anchor)

    @property
    def place(self) -> str:
        """Rule and module path, for messages."""
        return f"{self.rule} in {scope(self.anchor) or 'the model'} (at {self.anchor.op_type} {self.anchor.name!r})"


@dataclass(frozen=True, slots=True)
class Rule:
    """A fusion. `match` raises `Refusal` where the anchor does not turn out to be the pattern.

    anchors: (domain, op_type) of the nodes that a match can start from.
    """

    name: str
    op: PluginOp
    anchors: frozenset[tuple[str, str]]
    match: Callable[[ir.Model, ir.Node], Match]


@dataclass(frozen=True, slots=True)
class FusionRecord:
    """One rewrite that happened.

    replaced: names of the nodes that the region computed with and that nothing else needed.
    error: largest relative difference found by the proof, or None when the proof was switched off.
    """

    rule: str
    op: str
    scope: str
    node: str
    replaced: tuple[str, ...]
    attributes: Attributes
    error: float | None


@dataclass(frozen=True, slots=True)
class RefusalRecord:
    """One anchor at which a rule did not apply, and why."""

    rule: str
    scope: str
    reason: str
