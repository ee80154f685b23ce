"""The nodes of an engine's graphs by where they run, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from exporter.console import new_table

if TYPE_CHECKING:
    from rich.table import Table

_PLACES = {"CUDAExecutionProvider": "CUDA", "CPUExecutionProvider": "CPU"}


def draw_nodes(title: str, graphs: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Table:
    """graphs: graph -> provider -> op -> nodes. A row for each op and place, a column for each graph, and the sums."""
    table = new_table(title, "op", "runs on", *graphs, left=2)
    places = list(dict.fromkeys(place for placed in graphs.values() for place in placed))
    for place in places:
        for op in sorted({op for placed in graphs.values() for op in placed.get(place, {})}):
            counts = (placed.get(place, {}).get(op, 0) for placed in graphs.values())
            table.add_row(op, _PLACES.get(place, place), *(f"{count:,}" if count else "" for count in counts))
    table.add_section()
    for place in places:
        sums = (sum(placed.get(place, {}).values()) for placed in graphs.values())
        table.add_row("all", _PLACES.get(place, place), *(f"{count:,}" for count in sums), style="bold")
    return table
