"""What `cierzo export` takes for checkpoints that no memory holds: time, peak memory, and bytes of new disk.

Two checkpoints have the shape of a published one and holes for weights (see `sparse_checkpoints`); they are exported
with the default options, which leave the weights where they are. One of 2 GB is real and converted to float32. Every
export runs in a process of its own, and is held against the limits that Cierzo sets itself.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import write_checkpoint
from benchmarks.export_memory import dense
from benchmarks.report import Report, Row
from benchmarks.sparse_checkpoints import PUBLISHED, allocated_bytes, shape_of, write_sparse

_SAMPLED_EVERY = 0.01  # seconds
_SPARE = 1 << 30  # bytes of disk left alone
_IMPORTS = "import exporter, exporter.cli, exporter.compile, exporter.validate, onnxscript.optimizer, torch.onnx, onnx"
_REAL_SHAPE = dense(21)  # 1.96 GB in bfloat16


@dataclass(frozen=True, slots=True)
class Case:
    """An export and its limits, which are None where the project sets none.

    shape: a key of PUBLISHED, or None for the real checkpoint. arguments: given to `cierzo export`.
    seconds; resident: bytes; above_imports: bytes of anonymous memory over those of the imports alone.
    """

    shape: str | None
    arguments: tuple[str, ...] = ()
    seconds: float | None = None
    resident: float | None = None
    above_imports: float | None = None


CASES = {
    "Mixtral-8x22B, weights referenced": Case("Mixtral-8x22B", seconds=60, resident=1.2e9),
    "Mistral-7B, weights referenced": Case("Mistral-7B", seconds=30),
    "2 GB, converted to fp32": Case(None, ("--weights", "fp32"), above_imports=250e6),
}


@dataclass(frozen=True, slots=True)
class Run:
    """Wall time of a process, and the highest that its memory was: resident (VmHWM) and anonymous (RssAnon) bytes."""

    seconds: float
    resident: int
    anonymous: int


def run(command: list[str]) -> Run:
    """Run `command` to its end, with its output on the screen if it fails.

    The kernel keeps the highest resident size, so it is exact up to the last sample; the anonymous part is sampled.
    """
    resident = anonymous = 0
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now = _memory(process.pid)
            resident, anonymous = max(resident, now.get("VmHWM", 0)), max(anonymous, now.get("RssAnon", 0))
            time.sleep(_SAMPLED_EVERY)
        seconds = time.perf_counter() - began
        if process.returncode != 0:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{output.read()[-4000:]}")
    return Run(seconds, resident, anonymous)


def _memory(pid: int) -> dict[str, int]:
    """Bytes of the figures in /proc; none for a process that has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, ProcessLookupError):
        return {}
    return {name: 1024 * int(kib) for name, kib in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB$", status, re.MULTILINE)}


def measure(label: str, case: Case, extra: list[str], imports: int, repeats: int) -> Row:
    """The worst of `repeats` exports of one checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        if case.shape is None:
            needed = _REAL_SHAPE.stored_bytes + 4 * _REAL_SHAPE.parameters + _SPARE
            if shutil.disk_usage(folder).free < needed:
                raise SystemExit(f"{label} needs {needed / 1e9:.1f} GB in the temporary folder; TMPDIR moves it")
            write_checkpoint(checkpoint, _REAL_SHAPE)
        else:
            write_sparse(checkpoint, PUBLISHED[case.shape])
        runs, new_disk = [], 0
        for _ in range(repeats):
            bundle = folder / "bundle"
            command = [sys.executable, "-m", "exporter", "export", str(checkpoint), str(bundle), "--json"]
            runs.append(run([*command, *case.arguments, *extra]))
            new_disk = allocated_bytes(file for file in bundle.rglob("*") if file.is_file())
            shutil.rmtree(bundle)
    seconds, resident = max(run.seconds for run in runs), max(run.resident for run in runs)
    above = max(run.anonymous for run in runs) - imports
    return {
        "export": label,
        "checkpoint GB": (_REAL_SHAPE if case.shape is None else shape_of(PUBLISHED[case.shape])).stored_bytes / 1e9,
        "seconds": seconds,
        "% of limit": _share(seconds, case.seconds),
        "peak resident MB": resident / 1e6,
        "% of its limit": _share(resident, case.resident),
        "peak anonymous over imports MB": above / 1e6,
        "% of that limit": _share(above, case.above_imports),
        "new disk MB": new_disk / 1e6,
    }


def _share(value: float, limit: float | None) -> float | str:
    return "no limit" if limit is None else 100 * value / limit


def _judgement(label: str, case: Case, row: Row) -> str:
    """The row in a sentence, with each limit behind its figure."""
    parts = []
    for name, unit, limit in (
        ("seconds", "s", case.seconds),
        ("peak resident MB", "MB resident", None if case.resident is None else case.resident / 1e6),
        (
            "peak anonymous over imports MB",
            "MB anonymous over the imports",
            None if case.above_imports is None else case.above_imports / 1e6,
        ),
    ):
        if limit is not None:
            value = float(row[name] or 0)
            parts.append(f"{value:.0f} {unit} of {limit:.0f} ({'within' if value <= limit else 'OVER'})")
    return f"{label}: {', '.join(parts)}; {float(row['new disk MB'] or 0):.0f} MB of new disk"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1, help="exports of each checkpoint; the worst one counts")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="exports to make")
    parser.add_argument("--option", action="append", default=[], help="given to every export as well, e.g. --no-hash")
    options = parser.parse_args()
    report = Report(
        "export_large",
        "Export of checkpoints that no memory holds",
        "The published shapes are sparse files: true safetensors headers, shards and index, and holes for weights, "
        "which read as zeros. The 2 GB one has random weights. Made in a temporary folder and deleted. Each export "
        f"runs in its own process, proofs included; the worst of {options.repeats}. Peak resident memory is the "
        "kernel's high-water mark (VmHWM), mapped files included; anonymous memory (RssAnon) is sampled every "
        f"{1e3 * _SAMPLED_EVERY:.0f} ms. New disk counts the blocks of the bundle's files that no other name holds. "
        f"Additional options: {' '.join(options.option) or 'none'}. Seconds are those of a machine that other "
        f"processes share ({os.cpu_count()} processors).",
    )
    imports = [run([sys.executable, "-c", _IMPORTS]) for _ in range(3)]
    anonymous = int(statistics.median(run.anonymous for run in imports))
    report.say(f"The imports alone hold {anonymous / 1e6:.0f} MB of anonymous memory")
    rows = []
    for label in options.cases:
        rows.append(measure(label, CASES[label], options.option, anonymous, options.repeats))
        report.say(_judgement(label, CASES[label], rows[-1]))
    report.tables["Exports"] = rows
    report.finish()


if __name__ == "__main__":
    main()
