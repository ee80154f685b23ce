"""Is the ring written in place? Decode steps with past and present in one buffer, and with a copy forced.

The model is tiny and its ring is not, so that a copy of the ring could not hide. For each capacity the same graph runs
with each past and present bound to one buffer, and with each bound to its own, in turn with one memcpy of a ring.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.checkpoints import Shape, write_checkpoint
from benchmarks.raw_step import RawStep
from benchmarks.report import Report, Row
from exporter import export
from exporter.machine import seconds

CHUNK = 16
_PROFILED = 30


def shape_with(capacity: int) -> Shape:
    """One layer whose ring has `capacity` slots of 8 heads × 64."""
    return Shape(
        hidden=64, layers=1, heads=8, kv_heads=8, head_dim=64, ffn=128, vocabulary=64, window=capacity - CHUNK + 1
    )  # fmt: skip


def measure(capacity: int, rounds: int, folder: Path) -> Row:
    """One capacity: milliseconds of the step, of its ScatterElements nodes, and of copying its two rings."""
    bundle = export(write_checkpoint(folder / "checkpoint", shape_with(capacity)), folder / "bundle", chunk=CHUNK)
    step, copying = RawStep(bundle), RawStep(bundle, in_place=False)
    addresses = [ring.ctypes.data for ring in step.rings]
    target = [np.ones_like(ring) for ring in step.rings]

    def copy_rings() -> None:
        for new, old in zip(target, step.rings, strict=True):
            np.copyto(new, old)

    for warm in (step.run, copying.run, copy_rings):
        warm()
    times: dict[str, list[float]] = {"in place": [], "copied": [], "memcpy": []}
    works = {"in place": step.run, "copied": copying.run, "memcpy": copy_rings}
    for round_ in range(rounds):
        for name in list(works) if round_ % 2 else list(works)[::-1]:
            times[name].append(1e3 * seconds(works[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    extra = statistics.median(b - a for a, b in zip(times["in place"], times["copied"], strict=True))
    writes = {}
    for name, in_place in (("in place", True), ("copied", False)):
        profiled = RawStep(bundle, in_place=in_place, profile_folder=folder)
        for _ in range(_PROFILED):
            profiled.run()
        ops = {time.op: time.milliseconds for time in profiled.op_times(skip=5)}
        writes[name] = ops["ScatterElements"]
        if in_place:
            attention = ops["Attention"]
            total = sum(ops.values())
    return {
        "S": capacity,
        "rings MB": sum(ring.nbytes for ring in step.rings) / 1e6,
        "step in place ms": medians["in place"],
        "step copied ms": medians["copied"],
        "paired difference ms": extra,
        "memcpy of the rings ms": medians["memcpy"],
        "writes in place ms": writes["in place"],
        "writes copied ms": writes["copied"],
        "writes, % of step": 100 * writes["in place"] / total,
        "attention ms": attention,
        "same addresses": step.output_addresses() == addresses,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacities", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192, 16384], help="S")
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each kind")
    options = parser.parse_args()
    report = Report(
        "in_place",
        "The ring is written in place",
        "One layer, 8 heads × 64, keys and values in float32, one row, one token a step. Medians of steps in place, "
        "steps that must copy, and copies of both rings, timed in turn; other processes share the machine. Writes are "
        "the two ScatterElements nodes of RollingKVWrite in ONNX Runtime's profile, attention is what grows with S by "
        "its nature.",
    )
    rows = []
    for capacity in options.capacities:
        with tempfile.TemporaryDirectory() as name:
            rows.append(measure(capacity, options.rounds, Path(name)))
    report.tables["Milliseconds by ring capacity S"] = rows
    first, last = rows[0], rows[-1]
    report.say(
        f"From S = {first['S']} to {last['S']} the writes of a step go from {first['writes in place ms']:.3f} to "
        f"{last['writes in place ms']:.3f} ms, a copy of the rings from {first['memcpy of the rings ms']:.3f} to "
        f"{last['memcpy of the rings ms']:.3f} ms, and writes with the copy forced from "
        f"{first['writes copied ms']:.3f} to {last['writes copied ms']:.3f} ms"
    )
    report.say(
        "The presents lie at the addresses of the pasts after the steps: "
        + ("yes, for every S" if all(row["same addresses"] for row in rows) else "NO")
    )
    report.finish()


if __name__ == "__main__":
    main()
