"""The report's plots: errors against a budget, divergence as a histogram, and agreement by margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from exporter.report_html.canvas import Canvas, Scale, Size, both, decades, round_steps, step_of
from exporter.report_html.tables import share_of
from exporter.validation_report import Distributions


@dataclass(frozen=True, slots=True)
class Mark:
    """One error: where it stands from left to right, how large it is, what is allowed there, and its tooltip."""

    x: float
    error: float
    allowed: float
    label: str
    passed: bool


MOST_WINDOWS, MOST_CHUNKS = 8, 40
"""Upright lines of each kind; chunk borders that would be more are left out, and windows are counted in steps."""


def error_plot(
    marks: Sequence[Mark],
    ticks: Sequence[tuple[float, str]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    borders: Sequence[tuple[float, str, str]] = (),
) -> str:
    """Errors on a logarithmic axis, over a line of what is allowed. borders: upright lines: place, text, style."""
    y = decades([value for mark in marks for value in (mark.error, mark.allowed)])
    first, last = min((mark.x for mark in marks), default=0.0), max((mark.x for mark in marks), default=1.0)

    def draw(size: Size) -> str:
        canvas = Canvas(size, title, Scale(first, max(last, first + 1e-9)), y)
        canvas.frame(ticks, x_label, y_label)
        _borders(canvas, borders)
        shown = _worst(marks, size.most)
        points = [f"{canvas.at_x(mark.x):.1f} {canvas.at_y(mark.allowed):.1f}" for mark in shown]
        level = len({mark.allowed for mark in shown}) == 1
        path = "L".join((points[0], points[-1]) if level and points else points)
        canvas.parts.append(f'<path class="allowed" d="M{path}"><title>budget</title></path>')
        right, above = size.width - size.right, canvas.at_y(marks[-1].allowed) - 6
        canvas.text(right, max(size.top + 12, above), "budget", "allowed-text", "end")
        for mark in sorted(shown, key=lambda mark: not mark.passed):  # what is wrong lies on top
            canvas.mark(mark.x, mark.error, "good" if mark.passed else "bad", mark.label)
        return canvas.svg()

    return both(draw) if marks else ""


def _worst(marks: Sequence[Mark], most: int) -> list[Mark]:
    """All, or of each stretch the one that is nearest to its budget or farthest beyond it."""
    width = -(-len(marks) // most) or 1
    return [
        max(marks[at : at + width], key=lambda mark: (share_of(mark.error, mark.allowed), mark.error))
        for at in range(0, len(marks), width)
    ]


def _borders(canvas: Canvas, borders: Sequence[tuple[float, str, str]]) -> None:
    """Upright lines; of texts that would overlap the first one stands."""
    free_from = -math.inf
    for place, text, style in sorted(borders, key=lambda border: (border[2] != "chunk", border[0])):
        half = 3.4 * len(text) + 3
        at = canvas.at_x(place)
        fits = style != "chunk" and at - half > free_from and at + half < canvas.size.width
        canvas.upright(place, text if fits else "", style)
        if fits and text:
            free_from = at + half


def window_borders(length: int, windows: Sequence[int | None], chunk: int) -> list[tuple[float, str, str]]:
    """Multiples of each distinct window below `length`, and the chunks' borders where they are few."""
    names: dict[int, list[str]] = {}
    distinct = sorted({window for window in windows if window is not None})
    for number, window in enumerate(distinct, start=1):
        name = "W" if len(distinct) == 1 else f"W{subscript(number)}"
        step = step_of(-(-length // window), MOST_WINDOWS)
        for multiple in sorted({1, *range(step, -(-length // window), step)}):
            if multiple * window < length:
                names.setdefault(multiple * window, []).append(name if multiple == 1 else f"{multiple:,}{name}")
    found = [(float(place), " = ".join(same), "window") for place, same in names.items()]
    if chunk > 1 and length // chunk <= MOST_CHUNKS:
        found += [(float(place), "", "chunk") for place in range(chunk, length, chunk)]
    return found


def subscript(number: int) -> str:
    """The number in small digits that stand low."""
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


@dataclass(frozen=True, slots=True)
class Bin:
    """How many values are at least `low` and below `high`; None: those that have no place on a logarithmic axis."""

    low: float | None
    high: float | None
    count: int


def log_bins(values: Sequence[float], per_decade: int = 3, least: float = 1e-18) -> list[Bin]:
    """Bins of equal width in log10 from the smallest positive value to the largest.

    The first bin is for values up to `least`, which are zero but for rounding, if there are any; the last one for those
    that are not finite.
    """
    zero = sum(value <= least for value in values)
    bins = [Bin(None, least, zero)] if zero else []
    spread = [math.log10(value) for value in values if least < value < math.inf]
    if spread:
        first, last = math.floor(min(spread) * per_decade), math.floor(max(spread) * per_decade)
        counts = [0] * (last - first + 1)
        for value in spread:
            counts[math.floor(value * per_decade) - first] += 1
        edges = [10.0 ** (index / per_decade) for index in range(first, last + 2)]
        bins += [Bin(low, high, count) for low, high, count in zip(edges, edges[1:], counts, strict=False)]
    lost = len(values) - zero - len(spread)
    return [*bins, Bin(None, None, lost)] if lost else bins


def bin_name(span: Bin) -> str:
    """The bin in words."""
    if span.low is None:
        return "not finite" if span.high is None else "0"
    return f"{span.low:.1e} to {span.high:.1e}"


def divergence_plot(values: Sequence[float]) -> str:
    """How many positions have which divergence: bars over a logarithmic axis."""
    bins = log_bins(values)
    title = "Divergence of the engine's next-token distributions from the truth's: positions by size"

    def draw(size: Size) -> str:
        canvas = Canvas(size, title, Scale(0, len(bins)), Scale(0, max(span.count for span in bins)))
        ticks = [
            (index + 0.5, "0" if span.high is not None else "∞") for index, span in enumerate(bins) if not span.low
        ]
        ticks += [
            (float(index), f"{span.low:.0e}".replace("e-0", "e−").replace("e-", "e−"))
            for index, span in enumerate(bins)
            if span.low and abs(math.log10(span.low) - round(math.log10(span.low))) < 1e-6
        ]
        canvas.frame(sorted(ticks), "KL divergence, nats (logarithmic)", "positions")
        for index, span in enumerate(bins):
            if span.count:
                left, right = canvas.at_x(index) + 1, canvas.at_x(index + 1) - 1
                top = canvas.at_y(span.count)
                canvas.parts.append(
                    f'<rect class="column" x="{left:.1f}" width="{max(1.0, right - left):.1f}" y="{top:.1f}" '
                    f'height="{canvas.floor - top:.1f}"><title>{escape(bin_name(span))}: {span.count:,}</title></rect>'
                )
        return canvas.svg()

    return both(draw) if bins else ""


def agreement_states(distributions: Distributions, near_ties: Sequence[float]) -> list[str]:
    """For each position: `good` (the same best token), `tie` (another, on a margin below its near-tie) or `bad`."""
    return [
        "good" if same else "tie" if margin < near_tie else "bad"
        for same, margin, near_tie in zip(distributions.same_best, distributions.margin, near_ties, strict=True)
    ]


def _first_of_each(states: Sequence[str], state: str, width: int) -> list[int]:
    """The first index with that state in each stretch of `width`, so that a page of a long row stays small."""
    found = {at // width: at for at in reversed(range(len(states))) if states[at] == state}
    return sorted(found.values())


def agreement_plot(
    distributions: Distributions,
    places: Sequence[int],
    near_ties: Sequence[float],
    borders: Sequence[tuple[float, str, str]],
) -> str:
    """The truth's margin at each of the positions `places`, and where the engine has another best token.

    near_ties: below which margin that is no fault, by position.
    """
    states, margins = agreement_states(distributions, near_ties), distributions.margin
    title = "By how much the truth's best token leads at each position, and where the engine's best token is another"

    def draw(size: Size) -> str:
        canvas = Canvas(size, title, Scale(0, max(1, places[-1])), decades([*margins, *near_ties], 1e-9))
        ticks = [(float(at), f"{at:,}") for at in round_steps(places[-1] + 1, size.ticks)]
        canvas.frame(ticks, "position in the row", "margin of the truth's best logit")
        _borders(canvas, borders)
        every, right = -(-len(margins) // size.most) or 1, size.width - size.right
        line = f"M{size.left} {canvas.at_y(near_ties[0]):.1f}"
        if len(set(near_ties)) > 1:
            line += "".join(f"L{canvas.at_x(places[at]):.1f} {canvas.at_y(near_ties[at]):.1f}"
                            for at in range(0, len(places), every))  # fmt: skip
        canvas.parts.append(f'<path class="allowed" d="{line}H{right}"><title>near-tie</title></path>')
        canvas.text(right, canvas.at_y(near_ties[-1]) - 6, "2 × budget", "allowed-text", "end")
        order = [at for state in ("good", "tie", "bad") for at in _first_of_each(states, state, every)]
        words = {"good": "the same best token", "tie": "another, a near-tie", "bad": "another best token"}
        for at in order:
            label = f"position {places[at]}: {words[states[at]]}, margin {margins[at]:.2e}"
            canvas.mark(places[at], margins[at], states[at], label)
        return canvas.svg()

    return both(draw) if margins else ""
