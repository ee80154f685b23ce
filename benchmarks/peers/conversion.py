"""Converting a checkpoint once per contestant: seconds, peak memory and bytes, kept beside what was made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.environments import Environments

ROOT = Path(__file__).resolve().parents[2]
_RECORD = "conversion.json"
_LIMIT = 900  # seconds of one command


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion took. peak_rss: of the largest process, in bytes. nbytes: of the files that are loaded.
    error: the converter's last words, and then the rest says nothing."""

    path: str
    seconds: float
    peak_rss: int
    nbytes: int
    error: str | None = None


def convert(
    environments: Environments, contestant: Contestant, checkpoint: Path, folder: Path, *, anew: bool
) -> Conversion:
    """Convert into `folder`, or read what was converted there before, unless that failed or `anew` is asked for."""
    record = folder / _RECORD
    if record.exists() and not anew:
        return Conversion(**json.loads(record.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"converting {checkpoint.name} for {contestant.name}", file=sys.stderr, flush=True)
    seconds, peak = 0.0, 0
    log = folder / "conversion.log"
    for command in contestant.convert(environments, checkpoint, folder):
        status, took, highest = _watched(command, log)
        seconds, peak = seconds + took, max(peak, highest)
        if status != 0:
            return Conversion("", seconds, peak, 0, last_words(log, status))
    (folder / "plain.gguf").unlink(missing_ok=True)  # a stage between
    path = folder / contestant.file
    done = Conversion(str(path), seconds, peak, _nbytes(path))
    record.write_text(json.dumps(asdict(done)), encoding="utf-8")
    return done


def last_words(log: Path, status: int) -> str:
    """The last line of a log that says something, in at most 300 letters."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line]
    return (said[-1] if said else f"ended with status {status}")[:300]


def _watched(command: list[str], log: Path) -> tuple[int, float, int]:
    """Exit status, seconds, and peak resident bytes of one command."""
    began = time.monotonic()
    with log.open("ab") as file:
        variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=variables)
        while (waited := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() - began > _LIMIT:
                process.kill()
            time.sleep(0.02)
    _, status, usage = waited
    process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for already
    return process.returncode, time.monotonic() - began, 1024 * usage.ru_maxrss


def _nbytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
