"""The numeric proof of a rewrite: the region before and the plugin node after, on inputs that seek the boundaries.

Both sides run twice: in float32, as the engine will, and in float64 wherever ONNX Runtime has all their operators in
it. The first run sees what only float32 does (a position that a cast rounds), the second what float32's rounding would
hide. Matchers that find several ways to read a region use the same measure to choose between them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.driver_types import Adapted, Match, as_fed, shape_of
from graph_passes.graph import Refusal, dims
from graph_passes.ops.base import OPSET, declare_op
from graph_passes.region import IR_VERSION, Region
from runtime.errors import ProofError

TOLERANCES: Mapping[str, float] = {
    "float64": 2.0**-19,
    "float32": 64 * float(np.finfo(np.float32).eps),
}
"""Largest difference by the precision of the run, relative to the largest magnitude of the output.

float64: the arithmetic itself errs by less than 1e-14 then. What is left is that an attribute such as `scale` is a
float32 number: half an eps (6e-8) of scores up to 30 moves a softmax by 1.8e-6, and 2⁻¹⁹ is 1.9e-6. Regions without
such an attribute come out equal to 1e-14.
float32: both sides do the same arithmetic in another order. Sums of up to a few dozen products err by a few eps; 64
eps (7.6e-6) leaves room for the longest sum of the examples.

Any wrong window, scale or head moves the output by far more. Integer and boolean outputs must be equal.
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """The largest relative difference over all examples, the output that had it, and the precision of the run.

    The run is that in float64 where there was one, unless float32 already showed a difference.
    """

    error: float
    output: str
    precision: str

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than rounding."""
        return self.error <= TOLERANCES[self.precision]


def prove(model: ir.Model, match: Match) -> Proof:
    """`measure`, held to the tolerance.

    Raises ProofError when the difference exceeds it, when one side is not finite, or when one cannot be run on its
    own; the message names rule, place and figures.
    """
    try:
        proof = measure(model, match)
    except Refusal as refusal:
        raise ProofError(f"{match.place}: nodes before and after cannot be run on their own: {refusal}.") from refusal
    if not proof.holds:
        raise ProofError(
            f"{match.place}: {match.op.name} does not compute what the graph computed before. Output {proof.output} "
            f"is off by {proof.error:.2e} of its largest value, where {TOLERANCES[proof.precision]:.1e} is rounding in "
            f"{proof.precision}, with attributes {dict(match.attributes)}. The graph was left as it was; this is a bug "
            "in the fusion, not in the checkpoint."
        )
    return proof


def first_that_holds(model: ir.Model, readings: Iterable[Match]) -> Match:
    """The first of several ways to read a region whose plugin node computes what the region computes.

    Raises Refusal with the nearest reading and by how much it misses. A reading may itself raise no Refusal: leave
    out what cannot be built.
    """
    nearest: tuple[float, str, Match] | None = None
    tried = 0
    for reading in readings:
        tried += 1
        try:
            proof = measure(model, reading)
        except Refusal as refusal:
            gap, why = float("inf"), refusal.reason
        else:
            if proof.holds:
                return reading
            gap, why = proof.error, f"{proof.output} is off by {proof.error:.1e} of its largest value"
        if nearest is None or gap < nearest[0]:
            nearest = (gap, why, reading)
    if nearest is None:
        raise Refusal("no inputs were found from which the result could be computed", None)
    _, why, reading = nearest
    raise Refusal(
        f"it looks like {reading.op.name} with {dict(reading.attributes)} but computes something else "
        f"({why}; {tried} reading{'s' if tried > 1 else ''} tried)",
        reading.anchor,
    )


def measure(model: ir.Model, match: Match, *, seed: int = 0) -> Proof:
    """How far region and node are apart over the op's examples; stops at the first that is more than rounding.

    The examples are seeded by the op's name and `seed`: the same every time. Raises Refusal when a side cannot be run.
    """
    narrow = _measure(model, match, "float32", seed)
    if not narrow.holds:
        return narrow
    try:
        return _measure(model, match, "float64", seed)
    except Refusal:  # an operator that ONNX Runtime has in float32 only
        return narrow


def _measure(model: ir.Model, match: Match, precision: str, seed: int) -> Proof:
    wide = precision == "float64"
    rng = np.random.default_rng([zlib.crc32(match.op.name.encode()), seed])
    alone = _alone(match)
    before = Region(model, match.sources, match.outputs, wide=wide)
    after = Region(alone, alone.graph.inputs, alone.graph.outputs, wide=wide)
    worst = Proof(0.0, match.op.outputs[0], precision)
    for arrays in match.op.examples(rng, match.attributes, [shape_of(operand) for operand in match.inputs]):
        fed = [as_fed(operand, array) for operand, array in zip(match.inputs, arrays, strict=True)]
        # Outputs go by position: a match may name one value twice, which a fault in a matcher could do.
        for name, a, b in zip(match.op.outputs, before.run(fed), after.run(fed), strict=True):
            error = difference(a, b)
            if not error <= worst.error:
                worst = Proof(error, name, precision)
        if not worst.holds:
            break
    return worst


def difference(old: npt.NDArray[np.generic], new: npt.NDArray[np.generic]) -> float:
    """Largest |old − new| over largest |old|; infinite when shapes, types or integers differ, or not finite."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    if not np.issubdtype(old.dtype, np.floating):
        return 0.0 if np.array_equal(old, new) else float("inf")
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        return float("inf")
    wide_old, wide_new = old.astype(np.float64), new.astype(np.float64)
    largest = float(np.abs(wide_old).max(initial=0.0))
    gap = float(np.abs(wide_old - wide_new).max(initial=0.0))
    return gap / largest if largest > 0 else (0.0 if gap == 0 else float("inf"))


def _alone(match: Match) -> ir.Model:
    """A model of the plugin node and what brings its inputs into form, and nothing else."""
    sources, fed, nodes = [], [], []
    for name, operand, value in zip(match.op.inputs, match.inputs, match.sources, strict=True):
        source = ir.Value(name=f"{name}__source", type=value.type, shape=ir.Shape([None] * len(dims(value))))
        sources.append(source)
        if isinstance(operand, Adapted):
            made = list(operand.build(source))
            nodes += made
            fed.append(made[-1].outputs[0])
        else:
            fed.append(source)
    outputs = [
        ir.Value(name=name, type=value.type, shape=ir.Shape([None] * len(dims(value))))
        for name, value in zip(match.op.outputs, match.outputs, strict=True)
    ]
    nodes.append(match.op.node(fed, match.attributes, outputs))
    graph = ir.Graph(sources, outputs, nodes=nodes, opset_imports={"": OPSET}, name="after")
    model = ir.Model(graph, ir_version=IR_VERSION)
    declare_op(model, match.op, match.attributes, match.place)
    return model
