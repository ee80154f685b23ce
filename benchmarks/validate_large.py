"""What `cierzo validate` takes on models that memory hardly holds: minutes, and memory beyond the mapped weights.

The reference computes in float64, eight bytes a parameter, one layer at a time; the engine maps the checkpoint's files.
So the anonymous memory of a validation is that of the largest layer and of the head, whatever the model's depth. Its
limit here is what these make, four times over: the layer as it is stored, in float64, and once more in the engine's
type, and the head; and a gigabyte for the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Shape, write_checkpoint
from benchmarks.export_large import Run, run
from benchmarks.report import RESULTS, Report, Row

_SPARE = 2 << 30  # bytes of disk left alone


@dataclass(frozen=True, slots=True)
class Case:
    """A model with random weights, and the suite that it is validated with. minutes: the limit, None where there is
    none."""

    shape: Shape
    suite: str
    minutes: float | None = None


CASES = {
    "1.1B, window 1,024, quick": Case(
        Shape(2048, 18, 16, 4, 128, 7168, 32_000, window=1024, dtype="bfloat16"), "quick", minutes=1
    ),
    "Mistral-7B's shape, window 8, quick": Case(
        Shape(4096, 32, 32, 8, 128, 14_336, 32_000, window=8, dtype="bfloat16"), "quick"
    ),
}


def limit_bytes(shape: Shape) -> int:
    """Anonymous memory that a validation may take."""
    layer = (shape.parameters - 2 * shape.vocabulary * shape.hidden) // shape.layers
    return 16 * layer + 8 * 2 * shape.vocabulary * shape.hidden + (1 << 30)


def measure(label: str, case: Case) -> tuple[Row, str]:
    """Make the checkpoint, export it, validate it; its row and that row in a sentence."""
    shape = case.shape
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < shape.stored_bytes + _SPARE:
            raise SystemExit(
                f"{label} needs {shape.stored_bytes / 1e9:.0f} GB in the temporary folder; TMPDIR moves it"
            )
        checkpoint, bundle = write_checkpoint(folder / "checkpoint", shape), folder / "bundle"
        export = [sys.executable, "-m", "exporter", "export", str(checkpoint), str(bundle), "--json"]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        found, report = _validated(bundle, case.suite)
    limit = limit_bytes(shape)
    ran = [check for check in report["checks"] if check["status"] != "not run"]
    if not report["passed"]:
        raise SystemExit(f"{label}: parity fails: {[check for check in ran if check['status'] == 'failed']}")
    row: Row = {
        "model": label,
        "stored GB": shape.stored_bytes / 1e9,
        "checks": len(ran),
        "longest row": max(report["positions"]) + 1,
        "largest error, % of budget": 100 * max(c["error"] / c["budget"] for c in ran if c["error"] is not None),
        "minutes": found.seconds / 60,
        "peak anonymous GB": found.anonymous / 1e9,
        "limit GB": limit / 1e9,
        "peak resident GB, mapped files included": found.resident / 1e9,
    }
    within = "within" if found.anonymous <= limit else "OVER"
    text = (
        f"{label}: {len(ran)} checks hold in {found.seconds / 60:.1f} minutes, with {found.anonymous / 1e9:.1f} GB of "
        f"anonymous memory of {limit / 1e9:.1f} ({within})"
    )
    if case.minutes is not None:
        text += (
            f"; {case.minutes:g} minutes are the limit ({'within' if found.seconds <= 60 * case.minutes else 'OVER'})"
        )
    return row, text


def _validated(bundle: Path, suite: str) -> tuple[Run, dict[str, Any]]:
    report = bundle.parent / "report.json"
    shell = 'exec "$0" -m exporter validate "$1" --suite "$2" --json > "$3"'
    found = run(["sh", "-c", shell, sys.executable, str(bundle), suite, str(report)])
    return found, json.loads(report.read_text(encoding="utf-8"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="models to validate")
    options = parser.parse_args()
    report = Report(
        "validate_large",
        "Validation of models that memory hardly holds",
        "Random bfloat16 weights, made in a temporary folder, exported with the default options "
        "and validated in a process of its own. Anonymous memory (RssAnon) is sampled every 10 ms; resident memory is "
        "the kernel's high-water mark, in which mapped weights count as long as nobody else needs the memory. Minutes "
        "are those of a machine that other processes share; models may have been validated one by one.",
    )
    rows, said = _earlier()
    for label in options.cases:
        rows[label], said[label] = measure(label, CASES[label])
    for label in CASES:
        if label in rows:
            report.say(said[label])
    report.tables["Validations"] = [rows[label] for label in CASES if label in rows]
    report.finish()


def _earlier() -> tuple[dict[str, Row], dict[str, str]]:
    """Rows and sentences of the last results, by model: those of models that are not validated now stay."""
    try:
        results = json.loads((RESULTS / "validate_large.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, {}
    rows = {str(row["model"]): row for row in results["tables"]["Validations"]}
    return rows, {label: text for label in rows for text in results["summary"] if text.startswith(f"{label}: ")}


if __name__ == "__main__":
    main()
