"""What a benchmark leaves behind: lines on the screen, a JSON file and a small Markdown table in results/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"
Cell = str | int | float | bool | None
Row = Mapping[str, Cell]


@dataclass(slots=True)
class Report:
    """The result of one benchmark. Tables are lists of rows with the same keys; a key names its unit.

    method: how the figures were taken, in a sentence or two. summary: what they say, one line each.
    """

    name: str
    title: str
    method: str
    machine: dict[str, Any] = field(default_factory=describe)
    tables: dict[str, Sequence[Row]] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Keep a line of the summary."""
        self.summary.append(line)

    def finish(self, folder: Path = RESULTS) -> None:
        """Print everything, and write `name`.json and `name`.md into `folder`."""
        text = self.markdown()
        print(text, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(text + "\n", encoding="utf-8")
        data = {
            "benchmark": self.name,
            "method": self.method,
            "machine": self.machine,
            "summary": self.summary,
            "tables": {title: [dict(row) for row in rows] for title, rows in self.tables.items()},
        }
        serialised = json.dumps(data, indent=1, ensure_ascii=False)
        (folder / f"{self.name}.json").write_text(serialised + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """The report as Markdown."""
        machine = self.machine
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        lines = [
            f"# {self.title}",
            "",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, load "
            f"{machine['load_average']} at the start. Python {machine['python']}, {versions}.",
            "",
            self.method,
            "",
            *(f"- {line}" for line in self.summary),
        ]
        for title, rows in self.tables.items():
            lines += ["", f"## {title}", "", *_table(rows)]
        return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(rows[0])
    numeric = [all(isinstance(row[column], (int, float)) for row in rows) for column in columns]
    rule = ["---:" if right else "---" for right in numeric]
    cells = [columns, rule, *([_shown(row[column]) for column in columns] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _shown(cell: Cell) -> str:
    """Three significant digits for what was measured; what was counted is whole."""
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)
