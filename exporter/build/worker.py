"""The process that builds: reads a BuildJob on stdin, writes one JSON message a line on stdout; see job.py.

The job is one line. Stdin stays open behind it, and this process ends when it closes: when nobody is left who waits.
What the libraries print goes to stderr, which the process that started this one keeps for the case that it ends badly.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from exporter.build.job import DONE, PROGRESS, REFUSED, BuildJob, read_job
from exporter.machine import memory_of
from runtime.errors import BackendError, CierzoError
from runtime.tensorrt.flavor import load_flavor

ABANDONED = 3
"""Exit code where stdin was closed."""


class Messages:
    """Lines for the process that started this one. When it is gone, building is of no use to anybody."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, **message: Any) -> bool:
        """Returns whether somebody listens."""
        line = (json.dumps(message) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except BrokenPipeError:
            return False
        return True


def run(job: BuildJob, messages: Messages) -> Mapping[str, Any]:
    """Build all plans of a job into its folder. Returns seconds and kernels by plan, and what compiling needs.

    Raises BackendError as `build_plan` does, and where Polygraphy is not installed.
    """
    flavor = load_flavor(job.flavor)
    os.environ.update(flavor.environment)  # read when Polygraphy is imported
    from exporter.build.kernels import summary
    from exporter.build.plans import build_plan
    from exporter.parity_tools import quiet_polygraphy
    from runtime.tensorrt_plugins import register

    try:
        import polygraphy  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"Engines are built with Polygraphy, which is not installed here ({error}). "
            f'`pip install "cierzo[{flavor.name}]"` brings it.'
        ) from error
    plans: dict[str, Any] = {}
    capability = job.compute_capability if job.plugins else None
    with quiet_polygraphy(), register(flavor, job.plugins, compute_capability=capability) as registration:
        for name in job.plans:

            def report(percent: int, plan: str = name) -> bool:
                return messages.send(**{PROGRESS: [plan, percent]})

            built = build_plan(flavor, job, name, registration, report)
            _write(Path(job.folder) / f"{name}.plan", built.content)
            plans[name] = {
                "seconds": built.seconds,
                "summary": [dict(counts) for counts in summary(built.kernels, len(job.plans[name]))],
                "kernels": [kernel.to_json() for kernel in built.kernels],
            }
            del built  # an embedded plan is as large as the model, and the next one is to have its memory
        launched = [
            {"source": kernel.source, "name": kernel.name, "definitions": dict(kernel.definitions)}
            for kernel in registration.kernels
        ]
    return {"plans": plans, "launched": launched, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """The most that this process had in memory. What getrusage tells is also that of its parent, before it was this."""
    told = memory_of().get("VmHWM")
    if told is not None:
        return told
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write(path: Path, content: Any) -> None:
    try:
        with open(path, "wb") as file:
            file.write(memoryview(content))
    except OSError as error:
        raise BackendError(
            f"The plan {path.name} of {memoryview(content).nbytes / 1e6:,.1f} MB cannot be written into the bundle: "
            f"{error.strerror or error}. Free some space there, and build again."
        ) from error


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(ABANDONED)


def main() -> int:
    """Run the job on stdin. Returns the exit code: 0, or 2 if it was refused."""
    messages = Messages(os.dup(1))
    os.dup2(2, 1)
    job = read_job(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        messages.send(**{DONE: run(job, messages)})
    except CierzoError as error:
        messages.send(**{REFUSED: str(error)})
        return 2
    return 0


def start() -> NoReturn:
    """`main`, as all that a process does."""
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the library's own teardown, with engines still held, is nobody's concern
