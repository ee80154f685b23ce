"""Peak anonymous memory of `cierzo export` against the size of the checkpoint: it must not grow with it.

Anonymous memory (RssAnon) is what the process itself holds. A mapped checkpoint's pages are the page cache's, and the
kernel takes them back when it wants; they are not counted. Every export runs in a process of its own.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoints import Shape, write_checkpoint
from benchmarks.report import Report, Row
from exporter.machine import memory_of

_SAMPLED_EVERY = 0.01  # seconds
_SPARE = 2 << 30  # bytes of disk left alone
_IMPORTS = "import exporter, exporter.cli, exporter.compile, exporter.validate, onnxscript.optimizer, torch.onnx, onnx"


def dense(layers: int) -> Shape:
    """90 MB a layer in bfloat16."""
    return Shape(
        hidden=2048, layers=layers, heads=16, kv_heads=4, head_dim=128, ffn=5632, vocabulary=8192, window=256,
        dtype="bfloat16",
    )  # fmt: skip


def mixture(layers: int) -> Shape:
    """181 MB a layer in bfloat16, eight experts."""
    return Shape(
        hidden=1024, layers=layers, heads=16, kv_heads=4, head_dim=64, ffn=3584, vocabulary=8192, window=256,
        experts=8, dtype="bfloat16",
    )  # fmt: skip


CASES = {
    "dense, one layer": dense(1),
    "dense, 1 GB": dense(10),
    "dense, 2 GB": dense(21),
    "8 experts, one layer": mixture(1),
    "8 experts, 1 GB": mixture(6),
}


def watch(command: list[str]) -> tuple[float, dict[str, int]]:
    """Seconds of a command, and the highest of each memory figure that was sampled while it ran."""
    peak = {"RssAnon": 0, "VmRSS": 0}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            now = memory_of(process.pid)
        except (OSError, ProcessLookupError):
            break
        peak = {name: max(highest, now.get(name, 0)) for name, highest in peak.items()}
        time.sleep(_SAMPLED_EVERY)
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command[1:4])} ended with status {process.returncode}")
    return time.perf_counter() - began, peak


def measure(label: str, shape: Shape, repeats: int, imports: int) -> Row:
    """One checkpoint, exported `repeats` times."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        needed = shape.stored_bytes + 4 * shape.parameters + _SPARE
        if shutil.disk_usage(folder).free < needed:
            raise SystemExit(f"{label} needs {needed / 1e9:.1f} GB of disk in the temporary folder; TMPDIR moves it")
        checkpoint = write_checkpoint(folder / "checkpoint", shape)
        seconds, anonymous = [], []
        for _ in range(repeats):
            bundle = folder / "bundle"
            command = [sys.executable, "-m", "exporter", "export", str(checkpoint), str(bundle), "--json"]
            duration, peak = watch([*command, "--weights", "fp32"])
            written = sum(file.stat().st_size for file in bundle.iterdir())
            shutil.rmtree(bundle)
            seconds.append(duration)
            anonymous.append(peak["RssAnon"])
    highest = statistics.median(anonymous)
    return {
        "checkpoint": label,
        "checkpoint MB": shape.stored_bytes / 1e6,
        "bundle MB": written / 1e6,
        "seconds": statistics.median(seconds),
        "peak anonymous MB": highest / 1e6,
        "above imports MB": (highest - imports) / 1e6,
        "% of checkpoint": 100 * highest / shape.stored_bytes,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1, help="exports of each checkpoint")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="checkpoints to make")
    options = parser.parse_args()
    report = Report(
        "export_memory",
        "Memory of an export",
        "Synthetic bfloat16 checkpoints, made in a temporary folder and deleted. Each export runs in its own process, "
        f"proofs included; median of {options.repeats}. Peak anonymous memory is RssAnon sampled every "
        f"{1e3 * _SAMPLED_EVERY:.0f} ms, and the imports are those of the same process without an export. Seconds are "
        "those of a machine that other processes share, and of its disk.",
    )
    imports = int(statistics.median(watch([sys.executable, "-c", _IMPORTS])[1]["RssAnon"] for _ in range(3)))
    rows = [measure(label, CASES[label], options.repeats, imports) for label in options.cases]
    report.tables["Exports"] = rows
    report.say(f"The imports alone hold {imports / 1e6:.0f} MB")
    by_label = {row["checkpoint"]: row for row in rows}
    for small, large in (("dense, one layer", "dense, 2 GB"), ("8 experts, one layer", "8 experts, 1 GB")):
        if small in by_label and large in by_label:
            least, most = by_label[small], by_label[large]
            report.say(
                f"From {least['checkpoint MB']:.0f} to {most['checkpoint MB']:.0f} MB of checkpoint "
                f"({small.split(',')[0]}) the peak goes from {least['peak anonymous MB']:.0f} to "
                f"{most['peak anonymous MB']:.0f} MB"
            )
    report.finish()


if __name__ == "__main__":
    main()
