"""TensorRT engines of models of published shapes: how large plans are, how long building takes, and in what memory.

Weightless plans are built without a look at the weights, so the checkpoints are headers in front of holes, and no GPU
is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import Report, Row
from benchmarks.sparse_checkpoints import PUBLISHED, shape_of, write_sparse
from exporter import export

ONE_BILLION: dict[str, Any] = PUBLISHED["Mistral-7B"] | {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 4,
    "sliding_window": 1024,
}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "1B": (ONE_BILLION, "all"),
    "1B, no plugins": (ONE_BILLION, "none"),
    "Mistral-7B": (PUBLISHED["Mistral-7B"], "all"),
    "Mixtral-8x22B": (PUBLISHED["Mixtral-8x22B"], "all"),
}
"""Configurations, and which plugins to build with."""

LARGEST_PLAN, LARGEST_PEAK = 20e6, 1.5e9
"""What the plans of the 1B model, and the memory for building them, are to stay below."""


def build(bundle: Path, plugins: str, compute_capability: str) -> tuple[dict[str, Any], float]:
    """What `cierzo build --json` says, and the peak resident memory of its largest process, in bytes."""
    command = [sys.executable, "-m", "exporter", "build", str(bundle), "--plugins", plugins, "--json"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*command, "--compute-capability", compute_capability], stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if process.returncode < 0 or not said:
        raise SystemExit(f"`cierzo build` ended with {process.returncode} and said nothing.")
    told: dict[str, Any] = json.loads(said)
    if process.returncode != 0:
        raise SystemExit(told["error"]["message"])
    return told, usage.ru_maxrss * 1024


def measure(label: str, compute_capability: str) -> Row:
    """One model."""
    config, plugins = CASES[label]
    with tempfile.TemporaryDirectory() as name:
        checkpoint = write_sparse(Path(name) / "checkpoint", config, shard_bytes=None)
        bundle = export(checkpoint, Path(name) / "bundle", hashes=False, prove=False)
        told, peak = build(bundle, plugins, compute_capability)
    plans = told["plans"]
    return {
        "model": label,
        "weights GB": shape_of(config).stored_bytes / 1e9,
        **{f"{plan} MB": plans[plan]["bytes"] / 1e6 for plan in plans},
        **{f"{plan} seconds": plans[plan]["seconds"] for plan in plans},
        "peak MB": peak / 1e6,
        **{f"kernels of a {what}": sum(plans[plan]["kernels"][0].values()) for plan, what in _STEPS.items()},
        "of these plugins": plans["decode"]["kernels"][0]["plugin"],
    }


_STEPS = {"prefill": "chunk", "decode": "token"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute-capability", default="8.9", help="to build for (default: 8.9)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="models to build")
    options = parser.parse_args()
    report = Report(
        "engine_build",
        "Building engines",
        "Weightless bfloat16 engines for compute capability "
        f"{options.compute_capability}, built without a GPU; nothing was run. The decode plan has two profiles, of one "
        "row and of up to 8. Seconds are the library's on a machine that other processes share; peak is the resident "
        "memory of the larger of the two processes, with the pages of its mapped libraries. Kernels are those of the "
        "library's own list; a plugin counts as one, and may launch several.",
    )
    rows = [measure(label, options.compute_capability) for label in options.cases]
    report.tables["Engines"] = rows
    for row in rows:
        if str(row["model"]).startswith("1B"):
            largest = max(float(row[f"{plan} MB"] or 0) for plan in _STEPS)
            report.say(
                f"{row['model']}: the larger plan has {largest:.1f} MB (limit {LARGEST_PLAN / 1e6:.0f}), built in "
                f"{float(row['peak MB'] or 0):.0f} MB (limit {LARGEST_PEAK / 1e6:.0f})"
            )
    report.finish()


if __name__ == "__main__":
    main()
