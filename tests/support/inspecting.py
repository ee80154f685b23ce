"""What `cierzo inspect` prints, as a test sees it."""

from __future__ import annotations

import io

from rich.console import Console

from exporter.inspect import InspectReport, render


def drawn(report: InspectReport, width: int = 80) -> str:
    """The report's tables, none of which may be wider than `width` columns."""
    stream = io.StringIO()
    render(report, Console(file=stream, width=width))
    text = stream.getvalue()
    # The path stands in one piece, so that it can be copied; everything else fits.
    assert all(len(line) <= width for line in text.splitlines() if report.path not in line)
    assert "…" not in text
    return text
