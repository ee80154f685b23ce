"""Polygraphy, imported when it is needed: its runners and comparators hold two sides against each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from runtime.errors import CierzoError


def require_polygraphy() -> None:
    """Raises CierzoError, with what to type, when Polygraphy is not installed."""
    try:
        import polygraphy.comparator  # noqa: F401
    except ImportError as error:
        raise CierzoError(
            "Comparing module by module needs Polygraphy, which is not installed here "
            f'({error}). `pip install "cierzo[parity]"` brings it; it has no dependencies of its own.'
        ) from error


@contextlib.contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Polygraphy says nothing within this block; what it divides by zero for its statistics concerns nobody."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        yield


def largest_differences(results: Any, allowed: dict[str, float]) -> dict[str, tuple[float, bool]]:
    """(largest absolute difference, whether it is within `allowed`) for each output of two runners' results.

    results: a polygraphy RunResults of two runners with one iteration each. A difference that is not finite is
    infinite and fails.
    """
    from polygraphy.comparator import Comparator, SimpleCompareFunc

    tolerances = {"": 0.0, **allowed}
    compare = SimpleCompareFunc(atol=tolerances, rtol=0.0, check_error_stat="max")
    accuracy = Comparator.compare_accuracy(results, compare_func=compare)
    (per_iteration,) = next(iter(accuracy[0].values()))
    found: dict[str, tuple[float, bool]] = {}
    for name in allowed:
        # A bare False stands for outputs of different shapes.
        result = per_iteration.get(name, False)
        error = float(getattr(result, "max_absdiff", np.inf))
        finite = bool(np.isfinite(error))
        found[name] = (error if finite else float("inf"), finite and bool(result))
    return found
