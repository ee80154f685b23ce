"""An export that is killed at any moment leaves no bundle that loads, and the next one succeeds and tidies up.

Importing torch and tracing take seconds, so one process does both and then forks: each child is an export that begins
at once and is killed (SIGKILL) at its own moment.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

import exporter
from runtime import load
from tests.support.checkpoints import make_checkpoint

OPTIONS = {"linked": "{}", "converted": "{'weights': 'fp32'}"}
PATIENCE = 60.0

NURSERY = """
import os, sys, time
from exporter import export
from tests.support.bundles import shared_traces

source, warm = sys.argv[1:]
with shared_traces():
    export(source, warm, chunk=4, prove=False)
    began = time.perf_counter()
    stages = {}
    export(source, warm + "2", chunk=4, prove=False, weights="fp32",
           progress=lambda stage, done, total: stages.setdefault(stage, time.perf_counter() - began))
    seconds = time.perf_counter() - began
    print(seconds, seconds - stages["writing weights"], flush=True)
    for line in sys.stdin:
        out, options = line.rstrip("\\n").split("\\t")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                export(source, out, chunk=4, prove=False, **eval(options))
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()  # a process that nobody has waited for keeps its number, so that only it can be killed
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Nursery:
    """The process that forks exports. seconds: how long one of them took, and of these the last ones, for writing."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to: IO[str] = process.stdin
        self._from: IO[str] = process.stdout
        self.seconds, self.writing_seconds = map(float, self._from.readline().split())

    def start(self, out: Path, options: str) -> int:
        """The process number of an export to `out` that has begun."""
        self._say(f"{out}\t{options}")
        return int(self._from.readline())

    def end(self) -> int:
        """Exit code of the export that was started, −9 when it was killed in time."""
        self._say("")
        return int(self._from.readline())

    def _say(self, line: str) -> None:
        self._to.write(f"{line}\n")
        self._to.flush()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("nursery")
    source = make_checkpoint(
        folder / "checkpoint", hidden_size=256, intermediate_size=1024, vocab_size=4096, num_layers=6, dtype="bfloat16"
    )
    root = Path(exporter.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(source), str(folder / "warm")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("kind", OPTIONS)
def test_ten_kills_leave_nothing_that_loads_and_the_next_run_succeeds(
    tmp_path: Path, nursery: Nursery, kind: str
) -> None:
    """Half of the moments are counted from the start, half from when the hidden folder appears."""
    out, rng = tmp_path / "bundle", random.Random(20)
    seen = {"before writing": 0, "while writing": 0, "after": 0}
    for moment in range(10):
        child = nursery.start(out, OPTIONS[kind])
        if moment % 2:
            deadline = time.monotonic() + PATIENCE
            while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
                pass
            time.sleep((moment // 2 + rng.random()) / 5 * nursery.writing_seconds if moment > 1 else 0)
        else:
            time.sleep((moment // 2 + rng.random()) / 5 * nursery.seconds)
        os.kill(child, signal.SIGKILL)
        code = nursery.end()
        if out.exists():
            seen["after"] += 1
            assert load(out, verify=True, threads=1).forward([1, 2, 3]).shape == (1, 3, 4096)
            shutil.rmtree(out)
        else:
            assert code == -signal.SIGKILL
            seen["while writing" if list(tmp_path.iterdir()) else "before writing"] += 1
        for left in tmp_path.iterdir():
            assert left.name.startswith(".bundle.partial-")
        nursery.start(out, OPTIONS[kind])
        assert nursery.end() == 0
        assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"], "what the killed one left is gone"
        assert load(out, verify=True, threads=1).forward([1, 2, 3]).shape == (1, 3, 4096)
        shutil.rmtree(out)
    assert seen["before writing"] >= 1, seen
    assert seen["while writing"] >= 1, seen
