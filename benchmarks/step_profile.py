"""Where the time of a step goes: operators of a decode step and of a prefill chunk, against the machine's limits.

A decode step reads every linear weight once, so its limit is the read bandwidth; a chunk reuses what it reads, so its
limit is the rate of a large matrix product. Both limits are measured in turn with the steps that they are limits of.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import Shape, make_bundle
from benchmarks.raw_step import OpTime, RawStep
from benchmarks.report import Report, Row
from exporter.machine import MatmulPeak, ReadBandwidth, seconds
from runtime.backends.cores import physical_cores

CHUNK = 256
SHAPE = Shape(hidden=1024, layers=8, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocabulary=8192, window=256)
"""107 million parameters."""

_WARM = 3
_SHOWN = 12
_GEMM = ("Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class Against:
    """Seconds of a step, and a limit's units a second, measured in turn."""

    seconds: Sequence[float]
    limits: Sequence[float]

    def share(self, units: float) -> str:
        """A step does `units`; its rate at the median, and the fastest step against the fastest measured limit."""
        rate, best, limit = units / self.median, units / min(self.seconds), max(self.limits)
        share = f"{100 * best / limit:.0f} % of {limit / 1e9:.0f}"
        return f"{rate / 1e9:.0f} G/s at the median, {best / 1e9:.0f} at best, {share}"

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def against(step: RawStep, limit: Callable[[], float], rounds: int) -> Against:
    """Steps and limit in turn."""
    for _ in range(_WARM):
        step.run()
    times, limits = [], []
    for _ in range(rounds):
        limits.append(limit())
        times.append(seconds(step.run))
    return Against(times, limits)


def profiled(bundle: Path, width: int, steps: int, folder: Path) -> list[OpTime]:
    """Operators of a step of `width` tokens."""
    step = RawStep(bundle, width=width, profile_folder=folder)
    for _ in range(_WARM + steps):
        step.run()
    return step.op_times(skip=_WARM)


def rows_of(ops: Sequence[OpTime]) -> list[Row]:
    """The slowest operators, and the rest in one row."""
    total = sum(op.milliseconds for op in ops)
    rest = ops[_SHOWN:]
    shown = [
        *ops[:_SHOWN],
        OpTime(f"{len(rest)} others", sum(op.nodes for op in rest), sum(op.milliseconds for op in rest)),
    ]
    return [
        {
            "operator": op.op,
            "nodes": op.nodes,
            "ms a step": op.milliseconds,
            "% of step": 100 * op.milliseconds / total,
            "µs a node": 1e3 * op.milliseconds / max(1, op.nodes),
        }
        for op in shown
    ]


def say_shares(report: Report, what: str, ops: Sequence[OpTime]) -> None:
    """One line: matrix products, attention, everything else."""
    total = sum(op.milliseconds for op in ops)
    gemm = sum(op.milliseconds for op in ops if op.op in _GEMM)
    attention = sum(op.milliseconds for op in ops if op.op == "Attention")
    others = [op for op in ops if op.op not in (*_GEMM, "Attention")]
    report.say(
        f"{what}: matrix products {100 * gemm / total:.0f} %, attention {100 * attention / total:.0f} %, the other "
        f"{sum(op.nodes for op in others)} nodes {100 * (total - gemm - attention) / total:.0f} % "
        f"({total - gemm - attention:.2f} ms)"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode-rounds", type=int, default=100, help="timed decode steps")
    parser.add_argument("--prefill-rounds", type=int, default=24, help="timed chunks")
    options = parser.parse_args()
    threads = physical_cores()
    report = Report(
        "step_profile",
        "Where the time of a step goes",
        f"A Mistral of {SHAPE.parameters / 1e6:.0f}M random parameters in float32, W = {SHAPE.window}, one row. Rates "
        "are taken without profiling, in turn with the limit, and operators are medians over the steps of ONNX "
        f"Runtime's profile. Limits: memchr over 512 MB on {threads} threads, and the better of numpy's and ONNX "
        "Runtime's product of large square matrices. Only the linear weights count. Other processes share the machine, "
        "which slows medians and leaves the fastest of many short measurements alone.",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = make_bundle(folder, SHAPE, chunk=CHUNK)
        decode = against(RawStep(bundle), ReadBandwidth(threads), options.decode_rounds)
        prefill = against(RawStep(bundle, width=CHUNK), MatmulPeak(threads), options.prefill_rounds)
        decode_ops = profiled(bundle, 1, 40, folder)
        prefill_ops = profiled(bundle, CHUNK, 6, folder)
    report.say(
        f"Decode: {1 / decode.median:.1f} tokens/s, {1e3 * decode.median:.1f} ms; bytes of weights read: "
        f"{decode.share(4 * SHAPE.linear_parameters)}"
    )
    report.say(
        f"Prefill, {CHUNK} tokens: {CHUNK / prefill.median:.0f} tokens/s, {1e3 * prefill.median:.0f} ms; float32 "
        f"operations: {prefill.share(2 * SHAPE.linear_parameters * CHUNK)}"
    )
    say_shares(report, "Decode", decode_ops)
    say_shares(report, "Prefill", prefill_ops)
    report.tables["Decode, one token"] = rows_of(decode_ops)
    report.tables[f"Prefill, {CHUNK} tokens"] = rows_of(prefill_ops)
    report.finish()


if __name__ == "__main__":
    main()
