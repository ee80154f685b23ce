"""How far an engine may be from the reference: the one table of tolerances, and the budget made from it.

Truth is the reference in float64. An engine that computes in dtype d is held against the error that the reference
itself makes in d on the same tokens, so that a model with large activations gets the room that its arithmetic needs
and no other. Comparison is with teacher forcing: both sides read the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.errors import CheckpointError

Logits = npt.NDArray[np.floating]

_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Tolerance:
    """One row of the table.

    multiple: how many times the reference's own largest error the engine's largest may be.
    floor: in units of eps · max|logit|: below it both errors are a handful of roundings and their ratio is noise.
    ceiling: relative to max|logit|, whatever the reference's own error is.
    """

    eps: float
    multiple: float
    floor: float
    ceiling: float
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(
        eps=float(np.finfo(np.float32).eps),
        multiple=4.0,
        floor=16.0,
        ceiling=1e-4,
        reason=(
            "the engine adds in another order and rounds exp, cos and sin otherwise; over the parity tests its error "
            "is about that of the reference (832 runs: median ratio 0.82, 95 % below 1.35, 2.00 at most, both errors "
            "always below the floor), while one layer's window off by one exceeds the budget thousands of times"
        ),
    ),
    "float16": Tolerance(
        eps=float(np.finfo(np.float16).eps),
        multiple=4.0,
        floor=1.0,
        ceiling=2e-2,
        reason=(
            "keys and values are rounded to float16 where they are stored, and all else is float32; the reference does "
            "the same, so that its own error is that of the rounding, which the engine's may exceed where the two "
            "round a number that lies between to different sides"
        ),
    ),
    "bfloat16": Tolerance(
        eps=2.0**-7,
        multiple=2.0,
        floor=1.0,
        ceiling=0.25,
        reason=(
            "an engine that computes products and attention in bfloat16 and all else in float32, against the reference "
            "in bfloat16 throughout, which loses more: the engine's error is mostly below it"
        ),
    ),
    "float8": Tolerance(
        eps=2.0**-3,
        multiple=4.0,
        floor=1 / 16,
        ceiling=0.25,
        reason=(
            "keys and values are rounded to e4m3, with 3 bits behind the leading one, where they are stored; the "
            "reference does the same, in the type that the engine computes in"
        ),
    ),
    "int8": Tolerance(
        eps=1 / 254,
        multiple=4.0,
        floor=0.25,
        ceiling=0.25,
        reason=(
            "activations before quantised weights, or keys and values, are rounded to 8 bits with a scale for each "
            "block; the reference rounds by the same rule, so that its own error is that of the rounding. Kernels may "
            "choose other blocks for activations, and a router's near-tie may then fall to another expert"
        ),
    ),
}
"""By the coarsest type that the engine rounds to (`reference.rounding`) or computes in."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Largest absolute error allowed for one run, and where it comes from.

    reference_error: the ceiling where the reference overflows in that type.
    """

    allowed: float
    reference_error: float
    largest_logit: float
    tolerance: Tolerance


def budget(truth: Sequence[Logits], reference: Sequence[Logits], dtype: str) -> Budget:
    """The budget for an engine that rounds to `dtype`, from the reference's logits [T, V] in float64 and rounded so.

    Raises CheckpointError when the truth is not finite: the budget would be infinite, and every engine within it.
    """
    if not all(np.isfinite(row).all() for row in truth):
        raise CheckpointError(
            "The reference itself computes logits that are infinite or not a number, even in float64, so there is no "
            "truth to hold an engine against. The checkpoint's weights are damaged; use an intact one."
        )
    tolerance = TOLERANCES[dtype]
    largest = max(float(np.abs(row).max()) for row in truth)
    error = max(float(position_errors(a, b).max()) for a, b in zip(truth, reference, strict=True))
    room, ceiling = (
        max(tolerance.multiple * error, tolerance.floor * tolerance.eps * largest),
        tolerance.ceiling * largest,
    )
    return Budget(min(room, ceiling), error if math.isfinite(error) else ceiling, largest, tolerance)


def position_errors(truth_TV: Logits, logits_TV: Logits) -> npt.NDArray[np.float64]:
    """Largest |difference| over the vocabulary at each position, float64 [T]; infinite where a logit is not finite."""
    if truth_TV.shape != logits_TV.shape:
        raise ValueError(f"logits of shape {logits_TV.shape} are held against {truth_TV.shape}")
    gap = np.empty(truth_TV.shape[:-1])
    for first in range(0, len(truth_TV), _AT_ONCE):  # in pieces, because rows of logits take gigabytes in float64
        piece = slice(first, first + _AT_ONCE)
        wide = truth_TV[piece].astype(np.float64) - logits_TV[piece].astype(np.float64)
        gap[piece] = np.abs(wide).max(axis=-1, initial=0.0)
    return np.where(np.isfinite(gap), gap, np.inf)


def perplexity(logits_TV: Logits, next_ids_T: npt.NDArray[np.int64]) -> float:
    """exp of the mean negative log-likelihood of the tokens that followed (natural logarithm)."""
    wide = logits_TV.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(wide).sum(axis=-1))
    return float(np.exp(np.mean(log_sum - wide[np.arange(len(next_ids_T)), next_ids_T])))
