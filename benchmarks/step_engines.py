"""Engines of ONNX graphs for ONNX Runtime on CUDA, of models of published shapes: nodes, sizes, seconds and memory.

They are made without a look at the weights and without a GPU, so the checkpoints are headers in front of holes. Nodes
are what a step runs one after the other, since function bodies are inlined and nothing is optimised later; a node is
mostly one kernel, and Reshape and Shape are none.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Report, Row
from benchmarks.sparse_checkpoints import PUBLISHED, shape_of, write_sparse
from exporter import export
from runtime.bundle import read_bundle
from runtime.engine_files import read_engine_document
from runtime.engine_info import DECODE, PREFILL
from runtime.step_engine_info import parse_step_engine

BACKEND = "onnxruntime-cuda"
NO_KERNEL = {"Reshape", "Shape", "Unsqueeze"}
"""Ops whose output is their input under another shape, or a number on the host."""

CASES: dict[str, dict[str, Any]] = PUBLISHED


def measure(label: str) -> Row:
    """One model."""
    config = CASES[label]
    with tempfile.TemporaryDirectory() as name:
        checkpoint = write_sparse(Path(name) / "checkpoint", config, shard_bytes=None)
        path = export(checkpoint, Path(name) / "bundle", hashes=False, prove=False)
        began = time.perf_counter()
        command = [sys.executable, "-m", "exporter", "build", str(path), "--backend", BACKEND, "--json"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(f"`cierzo build` of {label} ended with status {code}")
        bundle = read_bundle(path)
        (engine,) = bundle.manifest.engines
        info = parse_step_engine(engine, read_engine_document(bundle, engine).root)
    launched = {
        kind: sum(
            number
            for counts in info.graphs[kind].placement.values()
            for op, number in counts.items()
            if op not in NO_KERNEL
        )
        for kind in (PREFILL, DECODE)
    }
    elsewhere = sum(len(graph.placement) > 1 for graph in info.graphs.values())
    return {
        "model": label,
        "weights GB": shape_of(config).stored_bytes / 1e9,
        "graphs MB": sum(graph.bytes for graph in info.graphs.values()) / 1e6,
        "seconds": seconds,
        "peak MB": usage.ru_maxrss * 1024 / 1e6,
        "nodes of a chunk": launched[PREFILL],
        "nodes of a token": launched[DECODE],
        "of these a layer": launched[DECODE] / config["num_hidden_layers"],
        "graphs with nodes off the GPU": elsewhere,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="models to build")
    options = parser.parse_args()
    report = Report(
        "step_engines",
        "Engines for ONNX Runtime on CUDA, built and not run",
        "bfloat16 engines of sparse checkpoints, built without a GPU. No GPU could be had while this backend was "
        "written, so nothing here was run on one: decode and prefill speed, their ratio to bandwidth and to "
        "transformers, and parity on the device are unmeasured, and `python -m tests.gpu --only onnxruntime` is what "
        "measures them. Nodes are those of the graphs without Reshape, Shape and Unsqueeze, which launch no kernel. "
        "Seconds are those of a machine that other processes share.",
    )
    rows = [measure(label) for label in options.cases]
    report.tables["Engines"] = rows
    for row in rows:
        report.say(
            f"{row['model']}: {row['nodes of a token']} nodes a token, all on the GPU; built in "
            f"{float(row['seconds'] or 0):.0f} s with {float(row['peak MB'] or 0):.0f} MB"
        )
    report.finish()


if __name__ == "__main__":
    main()
