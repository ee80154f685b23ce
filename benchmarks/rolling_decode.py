"""Decode time, KV bytes and resident memory at 2, 4 and 20 windows: none of them may grow with the text.

One engine reads a text of 20 W tokens in chunks and keeps a copy of its rings at 2 W, 4 W and 20 W. Single steps from
the three are then timed in turn, so that a drift of the machine's speed hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.checkpoints import Shape, make_bundle
from benchmarks.report import Report, Row
from exporter.machine import ReadBandwidth, memory_of, seconds
from runtime.backends.cores import physical_cores
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from runtime.bundle import read_bundle
from runtime.rolling_kv import RollingKV, kv_bytes, required_capacity

WINDOWS_FED = (2, 4, 20)
CHUNK = 256
_ROUNDS_A_READ = 10


def shape_with(window: int) -> Shape:
    """107 million parameters."""
    return Shape(
        hidden=1024, layers=8, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocabulary=8192, window=window
    )  # fmt: skip


class Run:
    """One window: the engine, and copies of its rings at each of the three positions."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape = shape
        opened = read_bundle(make_bundle(folder, shape, chunk=CHUNK))
        self.capacities = [layer.capacity for layer in opened.manifest.kv.layers]
        self.engine = OnnxRuntimeEngine(opened, threads=physical_cores())
        self.ids = np.random.default_rng(0).integers(0, shape.vocabulary, WINDOWS_FED[-1] * shape.window + 64)
        self.kept: dict[int, RollingKV] = {}
        for windows in WINDOWS_FED:
            self.kept[windows] = RollingKV(
                self.capacities, batch=1, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype="float32"
            )
            self.kept[windows].clear()  # touches the memory now, so that it does not look like growth later
        self.memory: dict[int, dict[str, int]] = {}
        self.bytes: dict[int, int] = {}

    def step(self, start: int, count: int) -> None:
        """Feed the text's tokens from `start` on; the last one's logits are computed."""
        tokens = self.ids[None, start : start + count]
        self.engine.step(tokens, np.array([start]), np.array([count]), np.array([[count - 1]]))

    def feed(self) -> float:
        """Read the whole text, remember the state at each position; tokens a second."""
        self.step(0, CHUNK)  # allocates what a chunk needs
        self.step(0, 1)
        self.engine.clear()
        began, done = time.perf_counter(), 0
        for windows in WINDOWS_FED:
            end = windows * self.shape.window
            while done < end:
                count = min(CHUNK, end - done)
                self.step(done, count)
                done += count
            _copy(self.engine.kv, self.kept[windows])
            self.memory[windows], self.bytes[windows] = memory_of(), self.engine.kv_bytes
        return done / (time.perf_counter() - began)

    def decode(self, rounds: int, read: ReadBandwidth) -> tuple[dict[int, list[float]], float]:
        """Seconds of one step at each position, round by round; and the median bandwidth of reads in between."""
        times: dict[int, list[float]] = {windows: [] for windows in WINDOWS_FED}
        bandwidths = []
        for round_ in range(rounds):
            if round_ % _ROUNDS_A_READ == 0:
                bandwidths.append(read())
            turn = round_ % len(WINDOWS_FED)
            for windows in WINDOWS_FED[turn:] + WINDOWS_FED[:turn]:
                _copy(self.kept[windows], self.engine.kv)
                times[windows].append(seconds(partial(self.step, windows * self.shape.window, 1)))
        return times, statistics.median(bandwidths)


def _copy(source: RollingKV, target: RollingKV) -> None:
    for old, new in zip(source.layers, target.layers, strict=True):
        np.copyto(new.key_BGSD, old.key_BGSD)
        np.copyto(new.value_BGSD, old.value_BGSD)


def measure(window: int, rounds: int, report: Report) -> None:
    """One window: rows and summary lines into `report`."""
    shape = shape_with(window)
    with tempfile.TemporaryDirectory() as name:
        run = Run(shape, Path(name))
        fed_per_second = run.feed()
        times, bandwidth = run.decode(rounds, ReadBandwidth(physical_cores()))
    formula = kv_bytes(
        [required_capacity(window, CHUNK)] * shape.layers,
        batch=1, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype="float32",
    )  # fmt: skip
    rows: list[Row] = []
    for windows in WINDOWS_FED:
        median = statistics.median(times[windows])
        low, high = (float(np.quantile(times[windows], q)) for q in (0.25, 0.75))
        rows.append(
            {
                "position": f"{windows} W = {windows * window}",
                "ms a token": 1e3 * median,
                "quartiles": f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                "tokens/s": 1 / median,
                "% of read bandwidth": 100 * 4 * shape.linear_parameters / median / bandwidth,
                "KV bytes": run.bytes[windows],
                "resident MB": run.memory[windows]["VmRSS"] / 1e6,
                "anonymous MB": run.memory[windows]["RssAnon"] / 1e6,
            }
        )
    report.tables[f"W = {window}, {rounds} steps at each position"] = rows
    pairs = [late / early for late, early in zip(times[20], times[2], strict=True)]
    grown = (run.memory[20]["VmRSS"] - run.memory[2]["VmRSS"]) / 1e6
    same = {formula} == set(run.bytes.values())
    report.say(
        f"W = {window}: decode time at 20 W / at 2 W = {statistics.median(pairs):.3f} "
        f"(median over {rounds} pairs of neighbouring steps)"
    )
    report.say(
        f"W = {window}: KV bytes {sorted(set(run.bytes.values()))} at all positions, the formula "
        f"2·B·G·D·4·L·(W + C − 1) gives {formula}: {'equal' if same else 'DIFFERENT'}"
    )
    report.say(f"W = {window}: resident memory at 20 W minus at 2 W = {grown:+.1f} MB")
    report.say(f"W = {window}: the text was read at {fed_per_second:.0f} tokens/s")
    report.say(f"W = {window}: read bandwidth {bandwidth / 1e9:.1f} GB/s on {physical_cores()} threads")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024], help="W of each case")
    parser.add_argument("--rounds", type=int, default=120, help="steps at each position")
    options = parser.parse_args()
    report = Report(
        "rolling_decode",
        "Decode time and memory past the window",
        f"A Mistral of {shape_with(1).parameters / 1e6:.0f}M random parameters in float32, chunk {CHUNK}, one row. "
        "Medians of single-token steps, the three positions timed in turn on one engine; other processes share the "
        "machine. The bandwidth is what the same number of threads read with memchr, and counts the linear "
        "weights only.",
    )
    for window in options.windows:
        measure(window, options.rounds, report)
    report.finish()


if __name__ == "__main__":
    main()
