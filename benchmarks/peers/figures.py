"""From samples to figures: medians, rates, ratios, and the rows of the report's tables. Nothing here runs anything."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Rates = Mapping[str, float]
"""Figure name to tokens a second."""


@dataclass(slots=True)
class Samples:
    """What one contestant gave for one model.

    rates: figure name to one sample in tokens/s per round. load_seconds: one per start. loaded, after_long: bytes
    resident after loading, and after reading the longest prompt with one text open. kv_bytes: by tokens of text.
    errors: what the engine said, by what it was asked. bandwidths: of the machine right before each decode after the
    short text, bytes/s: that of a shared machine changes from minute to minute.
    """

    rates: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    load_seconds: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    loaded: int | None = None
    after_long: int | None = None
    kv_bytes: dict[int, int] = field(default_factory=dict)
    pairs: list[float] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def medians(self) -> dict[str, float]:
        """The median over the rounds of every figure."""
        return {name: statistics.median(samples) for name, samples in self.rates.items()}


def rate(tokens: int, seconds: float) -> float:
    """Tokens a second."""
    return tokens / seconds


def decode_figure(context: int) -> str:
    """The name of a decode figure."""
    return f"decode @{context}"


def prefill_figure(tokens: int) -> str:
    """The name of a prefill figure."""
    return f"prefill {tokens}"


def best_of(rates: Mapping[str, Rates], figure: str) -> tuple[str, float] | None:
    """Who has the highest rate of a figure, and the rate; None where nobody has one."""
    found = [(name, figures[figure]) for name, figures in rates.items() if figure in figures]
    return max(found, key=lambda pair: pair[1], default=None)


def ratio(numerator: float, denominator: float) -> float:
    """Their quotient; not a number when there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan


def extent(samples: Sequence[float]) -> str:
    """Lowest and highest of some samples, and how many they are."""
    return f"{min(samples):.3g} to {max(samples):.3g} ({len(samples)})"


def relative_difference(logits: Sequence[float], reference: Sequence[float]) -> float:
    """Largest absolute difference over the largest absolute value of the reference."""
    largest = max(abs(value) for value in reference)
    return max(abs(a - b) for a, b in zip(logits, reference, strict=True)) / largest


def log_probability(logits: Sequence[float], token: int) -> float:
    """log softmax(logits)[token]."""
    highest = max(logits)
    return logits[token] - highest - math.log(sum(math.exp(value - highest) for value in logits))
