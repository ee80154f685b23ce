"""A small plot on a logarithmic axis, written as SVG by hand: marks, a line of what is allowed, ticks and tooltips.

Colours are CSS variables of the page that holds it, so that light and dark are the page's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 900, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 16, 52
_LEAST = 1e-12
"""What a zero is drawn as at the lowest: a logarithm has no place for it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One error: where it stands from left to right, how large it is, what is allowed there, and its tooltip."""

    x: float
    error: float
    allowed: float
    label: str
    passed: bool


def error_plot(
    marks: Sequence[Mark], ticks: Sequence[tuple[float, str]], *, x_label: str, y_label: str, title: str
) -> str:
    """An SVG element. ticks: place and text on the horizontal axis; those too close to read are left out."""
    finite = [value for mark in marks for value in (mark.error, mark.allowed) if 0 < value < math.inf]
    low = math.floor(math.log10(max(_LEAST, min(finite, default=_LEAST))))
    high = max(low + 1, math.ceil(math.log10(max(finite, default=1.0)) + 0.05))
    first, last = min((mark.x for mark in marks), default=0), max((mark.x for mark in marks), default=1)
    span = max(last - first, 1e-9)

    def at_x(x: float) -> float:
        return _LEFT + 8 + (x - first) / span * (WIDTH - _LEFT - _RIGHT - 16)

    def at_y(value: float) -> float:
        level = high if value == math.inf else math.log10(max(value, 10.0**low))
        return _TOP + (high - level) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" class="plot">',
        f"<title>{escape(title)}</title>",
    ]
    step = max(1, math.ceil((high - low) / 8))
    for power in range(low, high + 1, step):
        y = at_y(10.0**power)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">10'
            f'<tspan dy="-5" font-size="9">{str(power).replace("-", "−")}</tspan></text>'
        )
    floor = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{floor}"/>')
    parts += _ticks(ticks, at_x, floor)
    path = " ".join(f"{'M' if i == 0 else 'L'}{at_x(m.x):.1f} {at_y(m.allowed):.1f}" for i, m in enumerate(marks))
    parts.append(f'<path class="allowed" d="{path}"><title>budget</title></path>')
    if marks:
        above = max(_TOP + 10, at_y(marks[-1].allowed) - 7)
        parts.append(f'<text class="budget" x="{WIDTH - _RIGHT}" y="{above:.1f}" text-anchor="end">budget</text>')
    for mark in marks:
        state, radius = ("within", 3) if mark.passed else ("off", 5)
        parts.append(
            f'<circle class="{state}" cx="{at_x(mark.x):.1f}" cy="{at_y(mark.error):.1f}" r="{radius}">'
            f"<title>{escape(mark.label)}</title></circle>"
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(14 {(_TOP + floor) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    parts.append("</svg>")
    return "\n".join(parts)


def _ticks(ticks: Sequence[tuple[float, str]], at_x: object, floor: int) -> list[str]:
    assert callable(at_x)
    parts: list[str] = []
    free_from = -math.inf
    for x, text in ticks:
        place = at_x(x)
        half = 3.5 * len(text) + 4
        if place - half < free_from:
            continue
        free_from = place + half
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{floor}" y2="{floor + 5}"/>')
        parts.append(f'<text class="tick" x="{place:.1f}" y="{floor + 19}" text-anchor="middle">{escape(text)}</text>')
    return parts
