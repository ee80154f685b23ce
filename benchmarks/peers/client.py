"""A worker process, seen from the benchmark: loaded when its turn comes, stopped between its turns."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import WORKERS, Contestant
from benchmarks.peers.conversion import ROOT, last_words
from benchmarks.peers.environments import Environments
from exporter.machine import memory_of

_LIMIT = 900  # seconds of one command


class WorkerError(Exception):
    """The engine raised, or its process ended; the text is its own."""


@dataclass(frozen=True, slots=True)
class Timing:
    """prefill: seconds of reading the prompt, None where it was not read again. steps: seconds of each token after."""

    prefill: float | None
    steps: tuple[float, ...]


class Worker:
    """One engine in one process. While it is not asked anything it gets no processor time, whatever it spins on."""

    def __init__(self, environments: Environments, contestant: Contestant, *, threads: int, log: Path) -> None:
        self._contestant, self._threads, self._log = contestant, threads, log
        self._slots: set[str] = set()
        log.parent.mkdir(parents=True, exist_ok=True)
        # OMP_NUM_THREADS: the pools of libraries that `threads` does not reach, such as numpy's.
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [str(environments.python(contestant.environment)), "-m", f"{WORKERS}.{contestant.worker}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, cwd=ROOT, env=variables,
            )  # fmt: skip

    def load(self, path: str) -> float:
        """Seconds of loading, imports left out."""
        settings = dict(self._contestant.settings)
        return float(self._ask("load", path=path, threads=self._threads, settings=settings)["seconds"])

    def run(self, slot: str, ids: list[int], steps: int, *, resume: bool = False) -> Timing:
        """Read `ids` (in a slot that has read them before and may resume: do not) and time `steps` single tokens."""
        again = self._ask("run", slot=slot, ids=ids, steps=steps, resume=resume and slot in self._slots)
        self._slots.add(slot)
        return Timing(again["prefill"], tuple(again["steps"]))

    def answer(self, ids: list[int]) -> dict[str, Any]:
        """What follows `ids`; see workers.protocol.Engine.answer."""
        return self._ask("answer", ids=ids)

    def kv_bytes(self, slot: str, tokens: int) -> int | None:
        """Bytes of KV for a text of `tokens`; None where the engine does not tell."""
        told = self._ask("kv_bytes", slot=slot, tokens=tokens)["kv_bytes"]
        return None if told is None else int(told)

    def memory(self) -> dict[str, int]:
        """VmRSS and RssAnon in bytes."""
        return memory_of(self._process.pid)

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()  # which reaches a stopped process too
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, command: str, **arguments: object) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            self._process.send_signal(signal.SIGCONT)
            stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            stdin.flush()
            line = self._line()
        except BrokenPipeError:
            line = b""
        if not line:
            raise WorkerError(last_words(self._log, self._process.wait()))
        self._process.send_signal(signal.SIGSTOP)
        message = json.loads(line)
        if "error" in message:
            raise WorkerError(message["error"])
        result: dict[str, Any] = message["result"]
        return result

    def _line(self) -> bytes:
        """One line of the answer; a worker that says nothing for too long is ended."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + _LIMIT
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(deadline - time.monotonic()):
                self._process.kill()
                raise WorkerError(f"no answer within {_LIMIT} seconds")
        return stdout.readline()
