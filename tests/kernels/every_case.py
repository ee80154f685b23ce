"""The cases of all kernels in one process, or a share of them: `python -m tests.kernels.every_case FIRST STEP`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path

from tests.support.kernels import main

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*_cases.py"))


def every_case() -> Iterator[tuple[str, Callable[[], None]]]:
    """Module and name to case, those of one module together."""
    for module in MODULES:
        found = import_module(f"tests.kernels.{module}")
        cases = found.CASES if hasattr(found, "CASES") else found.cases()
        for name, case in cases.items():
            yield f"{module} {name}", case


if __name__ == "__main__":
    main(dict(islice(every_case(), int(sys.argv[1]), None, int(sys.argv[2]))))
