"""Tables that become cards on a narrow page, and the bar that shows a share of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SIGNS = {"passed": ("good", "✓"), "failed": ("bad", "✕"), "not run": ("none", "–")}
"""Style and sign of a verdict, so that colour is not all that tells them apart."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in one cell; markup: it is HTML already."""

    text: str
    markup: bool = False


def table(
    caption: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str | Cell]], *, hidden: str = ""
) -> str:
    """A table; `columns` are names and styles, and the first cell of a row names the row.

    hidden: what to open it by, if it is to be folded away. The roles are said, since a table whose rows are drawn as
    cards is no table to some readers otherwise.
    """
    head = "".join(
        f"<th scope='col' role='columnheader' class='{style}'>{escape(name)}</th>" for name, style in columns
    )
    lines = []
    for row in rows:
        cells = []
        for index, ((name, style), cell) in enumerate(zip(columns, row, strict=True)):
            text = cell.text if isinstance(cell, Cell) and cell.markup else escape(str(getattr(cell, "text", cell)))
            if index == 0:
                cells.append(f"<th scope='row' role='rowheader' class='{style}'>{text}</th>")
            else:
                cells.append(f"<td role='cell' class='{style}' data-name='{escape(name)}'>{text}</td>")
        lines.append(f"<tr role='row'>{''.join(cells)}</tr>")
    made = (
        f"<table role='table'><caption>{escape(caption)}</caption><thead role='rowgroup'><tr role='row'>{head}</tr>"
        "</thead>\n<tbody role='rowgroup'>\n" + "\n".join(lines) + "\n</tbody></table>"
    )
    return f"<details><summary>{escape(hidden)}</summary>\n{made}\n</details>" if hidden else made


def verdict(status: str) -> Cell:
    """A verdict with its sign."""
    style, sign = SIGNS[status]
    return Cell(f"<span class='{style}'><span class='sign' aria-hidden='true'>{sign}</span>{status}</span>", True)


def share_bar(error: float | None, budget: float | None) -> Cell:
    """How much of the budget was used, as a bar and in per cent."""
    if error is None or budget is None:
        return Cell("")
    share = share_of(error, budget)
    over = " over" if share > 1 else ""
    width = f"{100 * min(share, 1.0):.1f}"
    return Cell(
        f"<span class='bar{over}' aria-hidden='true'><i style='width:{width}%'></i></span>{percent(share)}", True
    )


def share_of(error: float, budget: float) -> float:
    """How much of the budget was used; infinite where that cannot be said."""
    if not error < float("inf"):
        return float("inf")
    return error / budget if budget > 0 else 0.0 if error == 0 else float("inf")


def percent(share: float) -> str:
    """A share of a budget; very large ones as a multiple. What is beyond the budget is never a round 100 %."""
    if share == float("inf"):
        return "not finite"
    if share < 10:
        return "> 100 %" if 1 < share < 1.005 else f"{100 * share:.0f} %"
    return f"{share:,.0f} ×" if share < 1e6 else f"{share:.0e} ×"


def figure(error: float) -> str:
    """An error in three digits."""
    if error == 0:
        return "0"
    return f"{error:.2e}" if error < float("inf") else "not finite"


def duration(seconds: float) -> str:
    """For a person."""
    if seconds < 1e-3:
        return "< 1 ms"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
