"""The budget: what it allows, and that nothing widens it by accident."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from reference.parity import TOLERANCES, budget, perplexity, position_errors
from runtime.errors import CheckpointError

EPS = float(np.finfo(np.float32).eps)


def rows(scale: float, error: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Truth with the largest logit `scale`, and logits that are off by `error` at one place."""
    truth = np.zeros((4, 5))
    truth[2, 3] = scale
    own = truth.copy()
    own[1, 1] += error
    return [truth], [own]


def test_the_budget_is_a_multiple_of_the_references_own_error() -> None:
    found = budget(*rows(10.0, 1e-4), "float32")
    assert found.allowed == pytest.approx(4e-4)
    assert found.reference_error == pytest.approx(1e-4)
    assert found.largest_logit == 10.0


def test_a_reference_without_error_leaves_room_for_a_handful_of_roundings() -> None:
    assert budget(*rows(10.0, 0.0), "float32").allowed == pytest.approx(16 * EPS * 10)


def test_a_bad_reference_does_not_excuse_a_bad_engine() -> None:
    assert budget(*rows(10.0, 5.0), "float32").allowed == pytest.approx(1e-4 * 10)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_a_finite_truth_there_is_no_budget(value: float) -> None:
    truth, own = rows(10.0, 0.0)
    truth[0][1, 2] = own[0][1, 2] = value
    with pytest.raises(CheckpointError, match="no truth to hold an engine against"):
        budget(truth, own, "float32")


def test_every_row_of_the_table_has_a_reason_and_an_order() -> None:
    for dtype, tolerance in TOLERANCES.items():
        assert tolerance.reason, dtype
        assert tolerance.floor * tolerance.eps < tolerance.ceiling, dtype
        assert 1 < tolerance.multiple <= 4, dtype
    orders = [("float32", "float16", coarsest) for coarsest in ("bfloat16", "float8", "int8")]
    assert {dtype for order in orders for dtype in order} == TOLERANCES.keys()
    for order in orders:
        rows = [TOLERANCES[dtype] for dtype in order]
        for finer, coarser in itertools.pairwise(rows):
            assert finer.eps < coarser.eps
            assert finer.floor * finer.eps < coarser.floor * coarser.eps
            assert finer.ceiling < coarser.ceiling
        # Half of the largest logit off is another function, whatever was rounded; in float32 a thousandth is.
        assert (rows[0].ceiling, rows[-1].ceiling) <= (1e-3, 0.5)


def test_position_errors_find_the_position_and_count_nan_as_infinite() -> None:
    truth = np.zeros((3, 4))
    logits = truth.astype(np.float32)
    logits[1, 2] = -0.5
    logits[2, 0] = np.nan
    assert position_errors(truth, logits).tolist() == [0.0, 0.5, math.inf]


def test_position_errors_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match="are held against"):
        position_errors(np.zeros((3, 4)), np.zeros((1, 4)))


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    assert perplexity(np.zeros((6, 50), np.float32), np.arange(6)) == pytest.approx(50)


def test_perplexity_of_certainty_is_one() -> None:
    logits = np.full((3, 4), -1000.0)
    logits[np.arange(3), [1, 0, 2]] = 0
    assert perplexity(logits, np.array([1, 0, 2])) == pytest.approx(1)
