"""The library's reports while it builds, as one number."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Report = Callable[[int], bool]
"""Told how many percent of a build are done; says whether to go on."""


class Percent:
    """Adds nested phases up. A phase of n steps is one step of the phase around it, and may itself have phases.

    Phases of several names may run at once, and be reported by several threads.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._told = -1
        self._going = True

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = parent, max(steps, 1), 0
        self._tell(name)

    def step(self, name: str, index: int) -> bool:
        """Step `index` of a phase is done. Returns whether the build is to go on."""
        with self._lock:
            parent, steps, done = self._phases.get(name, (None, 1, 0))
            self._phases[name] = parent, steps, min(max(done, index + 1), steps)
        self._tell(name)
        return self._going

    def finish(self, name: str) -> None:
        with self._lock:
            parent, steps, _ = self._phases.get(name, ("", 1, 0))
            if parent is None:  # the outermost one may leave steps out
                self._phases[name] = parent, steps, steps
        self._tell(name)
        with self._lock:
            self._phases.pop(name, None)

    def _tell(self, name: str) -> None:
        with self._lock:
            share = 0.0
            current: str | None = name
            while current is not None and current in self._phases:
                parent, steps, done = self._phases[current]
                share = min((done + share) / steps, 1.0)
                current = parent
            percent = int(100 * share)
            if current is not None or percent <= self._told:
                return  # a phase whose outermost one is not known says nothing of the whole
            self._told = percent
            self._going = self._going and self._report(percent)


def progress_monitor(trt: Any, percent: Percent) -> Any:
    """`percent` as an IProgressMonitor."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            percent.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return percent.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            percent.finish(phase_name)

    return Monitor()
