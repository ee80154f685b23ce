"""Progress bars: one at a time, in the stage's own unit, and only where somebody watches."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

import exporter.console
from exporter.console import ProgressBars
from exporter.defaults import BYTE_STAGES


def test_progress_is_silent_when_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    with exporter.console.progress_bars(quiet=False) as progress:
        assert progress is None  # pytest's stderr is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with exporter.console.progress_bars(quiet=False) as progress:
        assert isinstance(progress, ProgressBars)
    with exporter.console.progress_bars(quiet=True) as progress:
        assert progress is None


def test_one_bar_at_a_time() -> None:
    screen = io.StringIO()
    bars = ProgressBars(Console(file=screen, force_terminal=True, width=80))
    bars("trace", 0, 2)
    bars("trace", 1, 2)
    bars("prove", 0, 0)
    bars.close()
    text = screen.getvalue()
    assert text.index("trace") < text.index("prove")
    assert "1/2" in text


@pytest.mark.parametrize("stage", BYTE_STAGES)
def test_bytes_are_shown_with_rate_and_time_left(stage: str) -> None:
    screen = io.StringIO()
    bars = ProgressBars(Console(file=screen, force_terminal=True, width=100))
    bars(stage, 0, 40_000_000)
    bars(stage, 10_000_000, 40_000_000)
    bars(stage, 20_000_000, 40_000_000)
    bars.close()
    text = screen.getvalue()
    assert "20.0/40.0 MB" in text
    assert re.search(r"[\d.]+ .?B/s", text)
    assert re.search(r"0:00:0\d", text)
