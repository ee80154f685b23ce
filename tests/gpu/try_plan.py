"""Loads a plan and says what the library answers: `python -m tests.gpu.try_plan FLAVOUR PLAN`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runtime.errors import BackendError
from runtime.tensorrt.flavor import load_flavor
from tests.gpu.findings import told


def answer(flavor_name: str, plan: Path) -> str:
    """One line: how far it came, and every error of the library's log."""
    flavor = load_flavor(flavor_name)
    trt = flavor.trt
    lines: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                lines.append(f"{severity.name}: {message}")

    log = Log()
    reached = "nothing"
    try:
        _register(flavor)
        runtime = trt.Runtime(log)
        reached = "a runtime"
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is not None:
            reached = "an engine"
            context = flavor.open_context(engine, None)
            reached = "an execution context" if context.context is not None else reached
    except Exception as error:
        lines.append(told(error))
    return f"came as far as {reached}. {' | '.join(lines)}"


def _register(flavor: Any) -> None:
    """The plugins, if the plan holds some; without them it would fail for that alone."""
    from runtime.tensorrt_plugins import OPERATIONS, register

    _kept.append(register(flavor, tuple(OPERATIONS)))


_kept: list[Any] = []

if __name__ == "__main__":
    try:
        print(answer(sys.argv[1], Path(sys.argv[2])))
    except BackendError as error:
        print(f"the library does not load: {error}")
