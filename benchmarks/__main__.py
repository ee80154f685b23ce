"""All benchmarks one after the other, each in a process of its own, so that none inherits another's memory."""

from __future__ import annotations

import argparse
import subprocess
import sys

BENCHMARKS = (
    "in_place",
    "rolling_decode",
    "step_profile",
    "export_memory",
    "export_large",
    "fusion",
    "quantization",
    "engine_build",
    "step_engines",
    "validate_large",
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=BENCHMARKS, metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}")
    for name in names:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
        print(flush=True)


if __name__ == "__main__":
    main()
