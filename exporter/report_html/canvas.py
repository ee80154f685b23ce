"""Axes, ticks and marks of a plot, written as SVG by hand.

Every plot is drawn twice, for wide pages and for narrow ones, since letters shrink with the picture that they are in;
the page's style shows one of the two. Colours are classes of that style, so that light and dark are its business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True, slots=True)
class Size:
    """A picture's size in units, which are pixels at the width that it is drawn for.

    style: its class on the page. most: marks that one can tell apart. ticks: of an axis, at most.
    """

    style: str
    width: int
    height: int
    left: int
    right: int
    most: int
    ticks: int

    top: int = 36
    bottom: int = 46


WIDE = Size("broad", 1040, 340, 58, 14, 1000, 11)
NARROW = Size("narrow", 350, 290, 44, 8, 240, 5)


@dataclass(frozen=True, slots=True)
class Scale:
    """Takes values to 0 … 1 of an axis; on a logarithmic one values below `low` are drawn at `low`."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where on the axis: infinity at the end, what is not a number as well."""
        if not math.isfinite(value):
            return 1.0
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return min(1.0, max(0.0, (at - low) / max(high - low, 1e-300)))


_LEAST = 1e-12
"""What a zero is drawn as at the lowest: a logarithm has no place for it."""


def decades(values: Sequence[float], least: float = _LEAST) -> Scale:
    """A logarithmic scale from the power of ten below the smallest of `values` to that above the largest."""
    finite = [value for value in values if 0 < value < math.inf]
    low = math.floor(math.log10(max(least, min(finite, default=least))))
    high = max(low + 1, math.ceil(math.log10(max(finite, default=10.0 * least)) + 0.05))
    return Scale(10.0**low, 10.0**high, log=True)


@dataclass(slots=True)
class Canvas:
    """One picture: its axes, and what was drawn so far."""

    size: Size
    title: str
    x: Scale
    y: Scale
    parts: list[str] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        """Units from the left."""
        return self.size.left + 6 + self.x(value) * (self.size.width - self.size.left - self.size.right - 12)

    def at_y(self, value: float) -> float:
        """Units from the top."""
        return self.floor - self.y(value) * (self.floor - self.size.top)

    @property
    def floor(self) -> int:
        """Where the horizontal axis is, in units from the top."""
        return self.size.height - self.size.bottom

    def frame(self, x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> None:
        """Both axes with their names, powers of ten or whole numbers on the vertical one, `x_ticks` on the other."""
        left, right = self.size.left, self.size.width - self.size.right
        for value, spelled in self._y_ticks():
            y = self.at_y(value)
            self.parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.text(left - 6, y + 4, spelled, "tick", "end", markup=True)
        self.parts.append(f'<path class="axis" fill="none" d="M{left} {self.size.top}V{self.floor}H{right}"/>')
        free_from = -math.inf
        for value, text in x_ticks:
            x, half = self.at_x(value), 3.7 * len(text) + 4
            if x - half < free_from or x + half > self.size.width + 4:
                continue
            free_from = x + half
            self.parts.append(f'<path class="axis" d="M{x:.1f} {self.floor}v5"/>')
            self.text(x, self.floor + 19, text, "tick", "middle")
        self.text((left + right) / 2, self.size.height - 7, x_label, "label", "middle")
        self.text(4, 13, y_label, "label", "start")

    def _y_ticks(self) -> list[tuple[float, str]]:
        if not self.y.log:
            step = step_of(max(1, int(self.y.high)), 5)
            return [(float(value), f"{value:,}") for value in range(0, int(self.y.high) + 1, step)]
        low, high = round(math.log10(self.y.low)), round(math.log10(self.y.high))
        return [
            (10.0**power, f'10<tspan class="power" dy="-5">{_signed(power)}</tspan>')
            for power in range(low, high + 1, max(1, math.ceil((high - low) / 8)))
        ]

    def text(self, x: float, y: float, text: str, style: str, anchor: str, *, markup: bool = False) -> None:
        """A piece of text; markup: it is SVG already."""
        spelled = text if markup else escape(text)
        self.parts.append(f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{spelled}</text>')

    def upright(self, x: float, text: str, style: str) -> None:
        """A line over the whole height; its text, if any, stands above."""
        at = self.at_x(x)
        self.parts.append(f'<path class="{style}" d="M{at:.1f} {self.size.top}V{self.floor}"/>')
        if text:
            self.text(at, self.size.top - 4, text, f"{style}-text", "middle")

    def mark(self, x: float, y: float, style: str, label: str) -> None:
        """A dot for `good`, a diamond for `tie`, a cross for `bad`: told apart without colours too."""
        at_x, at_y = self.at_x(x), self.at_y(y)
        shape = {
            "good": f'<circle class="good" cx="{at_x:.1f}" cy="{at_y:.1f}" r="2.6"',
            "tie": f'<path class="tie" d="M{at_x:.1f} {at_y - 5.5:.1f}l5 5.5l-5 5.5l-5-5.5z"',
            "bad": f'<path class="bad" d="M{at_x - 4:.1f} {at_y - 4:.1f}l8 8m0-8l-8 8"',
        }[style]
        name = shape[1:].split()[0]
        # A finger has no pointer to hover with, so that the narrow picture does without.
        self.parts.append(f"{shape}><title>{escape(label)}</title></{name}>" if self.size is WIDE else f"{shape}/>")

    def svg(self) -> str:
        """The element."""
        size, title = self.size, escape(self.title)
        return (
            f'<svg viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{title}" '
            f'class="plot {size.style}">\n' + "\n".join(self.parts) + "\n</svg>"
        )


def _signed(number: int) -> str:
    return str(number).replace("-", "−")


def both(draw: Callable[[Size], str]) -> str:
    """The plot for wide pages and the one for narrow ones."""
    return f"<figure>\n{draw(WIDE)}\n{draw(NARROW)}\n</figure>"


def round_steps(length: int, most: int) -> range:
    """0 and multiples of 1, 2 or 5 times a power of ten below `length`, about `most` of them at most."""
    return range(0, length, step_of(length, most))


def step_of(length: int, most: int) -> int:
    """The least of 1, 2, 5, 10, 20, … of which `most` steps cover `length`."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power * most >= length:
                return digit * power
        power *= 10
