"""All kernels' cases under AddressSanitizer and UndefinedBehaviorSanitizer, at every level of instructions.

Nothing may be read or written outside a tensor, not even by a part of a vector: weights are mapped from files, and the
page after the last one may not exist.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.kernels import ROOT, levels, run_cases

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*_cases.py"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built with sanitizers, several files at once."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = sorted((ROOT / "runtime/kernels/cpu").glob("*.c"))
    objects = [str(folder / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, target: str) -> None:
        subprocess.run(["cc", "-std=gnu11", "-O1", "-g1", "-fPIC", *SANITIZERS, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "_cpu_sanitized.so"
    subprocess.run(["cc", "-shared", *SANITIZERS, *objects, "-o", str(library), "-lm"], check=True)
    return library


@pytest.fixture(scope="module")
def preload() -> str:
    """What Python, which was built without sanitizers, has to load first.

    The C++ library too: AddressSanitizer looks for its exceptions when it starts, and ONNX Runtime throws some.
    """
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = ["cc", f"-print-file-name={name}"]
        path = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        assert path.is_file(), f"the C compiler has no {name} of its own"
        paths.append(str(path))
    return ":".join(paths)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("module", MODULES)
def test_cases_are_clean(module: str, level: str, sanitized: Path, preload: str) -> None:
    printed = run_cases(
        module,
        level,
        LD_PRELOAD=preload,
        ASAN_OPTIONS="detect_leaks=0",  # Python itself leaves memory behind
        CIERZO_KERNEL_LIBRARY=str(sanitized),
    )
    assert printed.startswith(f"{level} {sanitized} ")
