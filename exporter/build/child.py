"""Runs a BuildJob in a process of its own, and turns whatever becomes of it into a result or one paragraph."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from exporter.build.job import DONE, PROGRESS, REFUSED, BuildJob
from runtime.errors import BackendError

_LOG_LINES, _LOG_BYTES = 6, 1 << 14
_START = "import sys; sys.path[:] = sys.argv[1:] or sys.path; from exporter.build.worker import start; start()"
WORKER = (sys.executable, "-c", _START)
"""The process that builds; it is given the folders to import from, which are those of this one in the same order."""


def run_job(job: BuildJob, progress: Callable[[str, int], None]) -> Mapping[str, Any]:
    """Build the job's plans; returns what `exporter.build.worker.run` does. progress: told plan and percent.

    The process ends when this returns, however it does. Raises BackendError with the reason that the process gave, and
    with how it ended and the last lines of its log when it gave none.
    """
    with tempfile.TemporaryFile() as log:
        command = (*WORKER, *sys.path)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # why it ended is in the log
                process.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
                process.stdin.flush()
            result: Mapping[str, Any] | None = None
            for line in process.stdout:
                if not line.endswith(b"\n"):
                    break  # its end came in the middle of a message
                message = json.loads(line)
                if PROGRESS in message:
                    progress(*message[PROGRESS])
                elif REFUSED in message:
                    raise BackendError(message[REFUSED])
                elif DONE in message:
                    result = message[DONE]
            code = process.wait()
            if result is None or code != 0:
                raise BackendError(_unexpected(job, code, log))
            return result
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


def _unexpected(job: BuildJob, code: int, log: BinaryIO) -> str:
    size = log.seek(0, 2)
    log.seek(max(0, size - _LOG_BYTES))
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    said = " | ".join(lines[-_LOG_LINES:]) or "nothing."
    how = f"with exit code {code}" if code >= 0 else f"by {_signal(-code)}"
    advice = " The system ends processes that take more memory than there is." if code == -signal.SIGKILL else ""
    return (
        f"The process that was building an engine with {job.flavor} was ended {how}.{advice} Nothing was left behind. "
        f"The last that it said: {said}"
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
