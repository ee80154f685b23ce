"""What the passes cost by depth: canonicalisation, fusions and proofs over a graph of 8, 16, 32 and 64 traced layers.

An export traces one layer of each kind and copies it, so that this is its worst case: every layer a kind of its own,
with its own window. The floor is one walk over the graph that copies every node and changes nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch

from benchmarks.report import Report, Row
from exporter.compile import expected_fusions
from exporter.plan import ExportPlan, make_plan
from exporter.trace import trace
from graph_passes import pipeline
from graph_passes.canonical import canonicalise
from reference.config import ModelConfig

DEPTHS = (8, 16, 32, 64)
ROUNDS = 3
LIMIT_SECONDS, LIMIT_DEPTH = 20.0, 32
"""What the project asks of the whole pipeline at that depth."""

_CONFIG = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "sliding_window": 4096,
}


def deep_plan(layers: int) -> ExportPlan:
    """Mistral 7B's layer, `layers` times, each with a window of its own."""
    config = ModelConfig.from_hf({**_CONFIG, "num_hidden_layers": layers})
    return make_plan(replace(config, layer_windows=tuple(4096 - layer for layer in range(layers))))


def measured(traced: ir.Model, plan: ExportPlan, layers: int, rounds: int) -> tuple[Row, dict[str, float]]:
    """One row of the table, and the median seconds of each pass."""
    copies, canonical, whole = [], [], []
    passes: dict[str, list[float]] = {}
    for _ in range(rounds):
        began = time.perf_counter()
        model = traced.clone()
        copies.append(time.perf_counter() - began)
        began = time.perf_counter()
        canonicalise(model)
        canonical.append(time.perf_counter() - began)
        model = traced.clone()
        began = time.perf_counter()
        report = pipeline.run(model, expected_fusions(plan, layers))
        whole.append(time.perf_counter() - began)
        for step in report.passes:
            passes.setdefault(step.name, []).append(step.seconds)
    row: Row = {
        "layers": layers,
        "nodes traced": len(traced.graph),
        "nodes fused": report.passes[-1].nodes_after,
        "fusions": len(report.fusions),
        "copy (s)": statistics.median(copies),
        "canonicalise (s)": statistics.median(canonical),
        "canonicalise per layer (ms)": 1e3 * statistics.median(canonical) / layers,
        "all passes with proofs (s)": statistics.median(whole),
        "per layer (ms)": 1e3 * statistics.median(whole) / layers,
    }
    return row, {name: statistics.median(seconds) for name, seconds in passes.items()}


def exponent(depths: Sequence[int], seconds: Sequence[float]) -> float:
    """The p of seconds ∝ layersᵖ, by least squares over the logarithms."""
    x, y = [math.log(depth) for depth in depths], [math.log(second) for second in seconds]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="numbers of layers")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each, of which the median counts")
    options = parser.parse_args()
    torch.set_num_threads(2)
    report = Report(
        "fusion",
        "Passes by depth",
        "Mistral 7B's layer at its real sizes, every layer traced by itself with its own window; weights have no data. "
        f"Median of {options.rounds}.",
    )
    rows, by_pass = [], []
    for layers in options.depths:
        plan = deep_plan(layers)
        row, passes = measured(trace(plan), plan, layers, options.rounds)
        print(row, flush=True)
        rows.append(row)
        by_pass.append({"layers": layers, **{f"{name} (s)": seconds for name, seconds in passes.items()}})
    for title in ("canonicalise (s)", "all passes with proofs (s)"):
        if len(rows) > 1:
            power = exponent(options.depths, [float(row[title] or 0) for row in rows])
            report.say(f"{title.removesuffix(' (s)')}: seconds grow with layers^{power:.2f}; 1 is linear")
    for row in rows:
        if row["layers"] == LIMIT_DEPTH:
            seconds = float(row["all passes with proofs (s)"] or 0)
            report.say(f"{LIMIT_DEPTH} layers, proofs included: {seconds:.1f} s, of {LIMIT_SECONDS:.0f} s allowed")
    report.tables = {"Depth": rows, "Passes": by_pass}
    report.finish()


if __name__ == "__main__":
    main()
