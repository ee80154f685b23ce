"""Grouped-query attention: softmax of masked, scaled scores over shared heads becomes one node with a bool mask.

Matched from the Softmax (or ONNX Attention) outwards, whatever the spelling: back through scale and mask to the product
of queries and keys, forward to the product with the values, and from each factor back through rearrangements and
constant factors (see `walk`) to values that could be query, key and value. Right because scores and result are linear
in each of the three between these borders, so that a reading that agrees with the op on random inputs is the function;
because the mask is a bool or was run for each truth value (see `masks`); and because nothing else may stand between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.driver_types import Match, Operand, Rule, shape_of
from graph_passes.fuse.layouts import heads_first
from graph_passes.fuse.masks import Mask, added
from graph_passes.fuse.scores import mixed, scores, softmax
from graph_passes.fuse.walk import back
from graph_passes.graph import Dim, Refusal, dims, integer_attribute, is_made_by, operand
from graph_passes.ops.grouped_query_attention import GROUPED_QUERY_ATTENTION
from graph_passes.prove import first_that_holds
from graph_passes.region import Region

_MOST_READINGS = 8
"""Readings that are tried; the first holds for every spelling that repeats heads in a common way."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What was found around the anchor: factors of the products, what scales and masks, and the possible results."""

    left: ir.Value
    right: ir.Value
    value: ir.Value
    factor: float
    mask: Mask
    results: list[ir.Value]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A value that could be query, key or value, and the constant between it and the product."""

    operand: Operand
    shape: tuple[Dim, ...]
    factor: float


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the Softmax, Exp or Attention to the first reading that computes what the graph computes."""
    pieces = _of_attention(model, anchor) if anchor.op_type == "Attention" else _of_softmax(model, anchor)
    for factor in (pieces.right, pieces.left, pieces.value):
        _refuse_tiled_heads(model, factor)
    try:
        return first_that_holds(model, itertools.islice(_readings(pieces, anchor), _MOST_READINGS))
    except Refusal as refusal:
        raise refusal if refusal.node is not None else _without_reading(pieces, anchor) from None


def _of_softmax(model: ir.Model, anchor: ir.Node) -> _Pieces:
    value, weights = softmax(anchor)
    found = scores(model, value)
    values, results = mixed(weights)
    return _Pieces(found.left, found.right, values, found.factor, found.mask, results)


def _of_attention(model: ir.Model, anchor: ir.Node) -> _Pieces:
    """ONNX Attention (opset 23 and later), which is this op but for what it can do besides."""
    if any(value is not None for value in anchor.inputs[4:]) or any(v.uses() for v in anchor.outputs[1:]):
        raise Refusal("the Attention keeps keys and values of its own (past and present)", anchor)
    if (softcap := anchor.attributes.get("softcap")) is not None and softcap.as_float():
        raise Refusal(f"the Attention caps its scores (soft-capping, {softcap.as_float():g})", anchor)
    if integer_attribute(anchor, "is_causal", 0):
        raise Refusal(
            "the Attention is causal by the order of its keys, which a ring does not keep: give it a mask", anchor
        )
    if ir.DataType(integer_attribute(anchor, "softmax_precision", ir.DataType.FLOAT.value)).bitwidth < 32:
        raise Refusal("the softmax is rounded to a narrower type, which the op does not compute", anchor)
    query, key, value = (operand(anchor, index) for index in range(3))
    if len(dims(query)) != 4:
        raise Refusal("the Attention's inputs have their heads side by side instead of on an axis", anchor)
    if len(anchor.inputs) < 4 or anchor.inputs[3] is None:
        raise Refusal("the scores are not masked", anchor)
    scale, mask = anchor.attributes.get("scale"), operand(anchor, 3)
    size = dims(query)[3]
    if scale is None and not isinstance(size, int):
        raise Refusal("the scale is that of a head dim that is not fixed", anchor)
    factor = scale.as_float() if scale is not None else float(size) ** -0.5
    choice = Mask(mask, True, 1.0, anchor) if mask.dtype == ir.DataType.BOOL else added(model, mask, 1.0, anchor)
    return _Pieces(query, key, value, factor, choice, [anchor.outputs[0]])


def _readings(pieces: _Pieces, anchor: ir.Node) -> Iterator[Match]:
    """Every combination of candidates whose shapes fit, the likeliest first."""
    values = _candidates(pieces.value)
    for one, other in ((pieces.left, pieces.right), (pieces.right, pieces.left)):
        keys = _candidates(other)
        for query in _candidates(one):
            results = [result for result in pieces.results if dims(result) == query.shape]
            rows, heads, tokens, size = query.shape
            for result, key in itertools.product(results, keys):
                groups, slots = key.shape[1], key.shape[2]
                if (key.shape[0], key.shape[3]) != (rows, size) or not _divides(groups, heads):
                    continue
                for value in values:
                    if value.shape != key.shape or value.factor != 1:
                        continue
                    visible = pieces.mask.operand(rows, tokens, slots)
                    yield Match(
                        "gqa",
                        GROUPED_QUERY_ATTENTION,
                        anchor,
                        (query.operand, key.operand, value.operand, visible),
                        {"scale": pieces.factor * query.factor * key.factor},
                        (result,),
                    )


def _divides(groups: Dim, heads: Dim) -> bool:
    return isinstance(groups, int) and isinstance(heads, int) and heads % groups == 0


def _candidates(value: ir.Value) -> list[_Candidate]:
    """What `value` rearranges, as [B, ·, ·, D]: first what lies so, and of that the farthest, before any repeat."""
    seen = [(step, _shape(step.value)) for step in reversed(back(value))]
    found = [
        _Candidate(way, shape_of(way), step.factor) for step, shape in seen for way in heads_first(step.value, shape)
    ]
    return sorted(found, key=lambda candidate: not isinstance(candidate.operand, ir.Value))


def _shape(value: ir.Value) -> tuple[Dim, ...]:
    return dims(value) if value.shape is not None else ()


def _refuse_tiled_heads(model: ir.Model, factor: ir.Value) -> None:
    """Raises Refusal when the heads of `factor` are repeated one after the other and not each beside itself.

    Such an attention could be read as one over all of the repeated heads; but then the repeat stays, and whoever wrote
    it is likelier to have meant another grouping.
    """
    steps = back(factor)
    if not any(is_made_by(step.value, "Tile", "Expand", "Concat", "Gather", "GatherND") for step in steps):
        return
    start = steps[-1].value
    shape = _shape(start)
    for step in reversed(steps):
        if len(_shape(step.value)) == 4:
            start, shape = step.value, _shape(step.value)
            break
    heads = shape[1] if len(shape) == 4 else 1
    if not isinstance(heads, int) or heads < 2 or start is factor:
        return
    sizes = [1, *(extent if isinstance(extent, int) else 2 for extent in shape[1:])]
    numbered = np.broadcast_to(np.arange(1, heads + 1, dtype=np.float32)[None, :, None, None], sizes)
    try:
        (laid_out,) = Region(model, [start], [factor]).run([numbered.copy()])
    except Refusal:
        return  # what cannot be run on its own is left to the proof
    varying = [axis for axis in range(laid_out.ndim) if np.ptp(laid_out, axis=axis).any()]
    if len(varying) != 1:
        return
    line = np.moveaxis(laid_out, varying[0], 0).reshape(laid_out.shape[varying[0]], -1)[:, 0]
    order = (line[np.flatnonzero(np.diff(line, prepend=0))] - 1).astype(int).tolist()
    if len(order) > heads:
        raise Refusal(
            f"the heads of {start.name!r} are tiled ({' '.join(map(str, order[:16]))}): grouped-query attention shares "
            "a head among neighbours (0 0 1 1), as repeat_interleave and expand do, and so computes something else",
            factor.producer(),
        )


def _without_reading(pieces: _Pieces, anchor: ir.Node) -> Refusal:
    """Which shapes do not fit, where no combination of candidates does."""

    def shown(value: ir.Value) -> str:
        return f"{value.name!r} [{', '.join(map(str, _shape(value)))}]"

    query, key, value = (back(factor)[-1].value for factor in (pieces.left, pieces.right, pieces.value))
    results = {result for result in map(_shape, pieces.results) if len(result) == 4}
    shapes = {candidate.shape for factor in (pieces.left, pieces.right) for candidate in _candidates(factor)}
    both = f"queries and keys come from {shown(query)} and {shown(key)}"
    if not results:
        reason = f"the result is {shown(pieces.results[-1])}, and nowhere laid out as [B, H, T, D]"
    elif not results & shapes:
        reason = f"the result {shown(pieces.results[0])} has not the shape [B, H, T, D] of the queries: {both}"
    elif not shapes & {candidate.shape for candidate in _candidates(pieces.value)}:
        reason = f"the values {shown(value)} have not the shape [B, G, S, D] of the keys: {both}"
    else:
        both = f"the result is {shown(pieces.results[0])}, the values {shown(value)}, {both}"
        reason = f"the shapes do not fit together: {both}"
    return Refusal(reason, anchor)


ANCHORS = frozenset({("", "Softmax"), ("", "Attention"), ("", "Exp")})

RULE = Rule("gqa", GROUPED_QUERY_ATTENTION, ANCHORS, match)
