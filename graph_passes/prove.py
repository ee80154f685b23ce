"""The numeric proof of a rewrite: the region before and the plugin node after, on inputs that seek the boundaries."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.driver_types import Match
from graph_passes.graph import Refusal, dims
from graph_passes.ops.base import OPSET, declare
from graph_passes.region import IR_VERSION, Region
from runtime.errors import ProofError

TOLERANCE = 64 * float(np.finfo(np.float32).eps)
"""Largest difference, relative to the largest magnitude of the output.

Both sides do the same float32 arithmetic in another order. Sums of up to a few dozen products err by a few eps; 64 eps
(7.6e-6) leaves room for the longest sum of the examples, and is far below any wrong window, scale or head, which move
the output by percents. Integer and boolean outputs must be equal.
"""


def prove(model: ir.Model, match: Match) -> float:
    """Largest relative difference between the region and the node over all examples of the op.

    Raises ProofError when it exceeds TOLERANCE, when one side is not finite, or when one cannot be run on its own; the
    message names rule, place and figures. The examples are seeded by the op's name: the same every time.
    """
    rng = np.random.default_rng(zlib.crc32(match.op.name.encode()))
    alone = _alone(match)
    worst = 0.0
    try:
        before = Region(model, match.inputs, match.outputs)
        after = Region(alone, alone.graph.inputs, alone.graph.outputs)
        for arrays in match.op.examples(rng, match.attributes, [dims(value) for value in match.inputs]):
            worst = max(worst, _compare(match, before.run(arrays), after.run(arrays)))
    except Refusal as refusal:
        raise ProofError(f"{match.place}: nodes before and after cannot be run on their own: {refusal}.") from refusal
    return worst


def _compare(match: Match, old: list[npt.NDArray[Any]], new: list[npt.NDArray[Any]]) -> float:
    """The largest difference of the outputs of one run; raises ProofError when it is more than rounding."""
    worst = 0.0
    for name, a, b in zip(match.op.outputs, old, new, strict=True):
        error = difference(a, b)
        if not error <= TOLERANCE:
            raise ProofError(
                f"{match.place}: {match.op.name} does not compute what the graph computed before. Output {name} "
                f"is off by {error:.2e} of its largest value, where {TOLERANCE:.1e} is rounding, with attributes "
                f"{dict(match.attributes)}. The graph was left as it was; this is a bug in the fusion, not in the "
                "checkpoint."
            )
        worst = max(worst, error)
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
    """A model of the plugin node and nothing else."""
    inputs = [
        ir.Value(name=name, type=value.type, shape=ir.Shape([None] * len(dims(value))))
        for name, value in zip(match.op.inputs, match.inputs, strict=True)
    ]
    outputs = [
        ir.Value(name=name, type=value.type, shape=ir.Shape([None] * len(dims(value))))
        for name, value in zip(match.op.outputs, match.outputs, strict=True)
    ]
    node = match.op.node(inputs, match.attributes, outputs)
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": OPSET}, name="after")
    model = ir.Model(graph, ir_version=IR_VERSION)
    declare(model, match.op.function(match.attributes))
    return model
