"""The kernels' cases under AddressSanitizer and UndefinedBehaviorSanitizer, at every level of instructions.

Nothing may be read or written outside a tensor, not even by a part of a vector: weights are mapped from files, and the
page after the last one may not exist.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.kernels import kernels
from tests.kernels.every_case import MODULES
from tests.support.kernels import ROOT, levels, run_cases

COMPILER = os.environ.get("CC") or "cc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
LEVELS = levels() if kernels() is not None else ("portable",)
LOWER_LEVELS_STEP = 4
"""The best level runs all cases; the lower ones run every fourth, each another."""


def compile_(*arguments: str | Path) -> None:
    done = subprocess.run([COMPILER, *SANITIZERS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Python, which was built without sanitizers, has to load first; skips where the machine has none.

    The C++ library too: AddressSanitizer looks for its exceptions when it starts, and ONNX Runtime throws some.
    """
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no C compiler {COMPILER!r}")
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [COMPILER, f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        path = Path(done.stdout.strip())
        if done.returncode != 0 or not path.is_file():
            pytest.skip(f"the C compiler {COMPILER!r} has no {name} that Python could load first")
        paths.append(str(path))
    folder = tmp_path_factory.mktemp("tried")
    (folder / "try.c").write_text("int main(void) { return 0; }\n")
    command = [COMPILER, *SANITIZERS, str(folder / "try.c"), "-o", str(folder / "try")]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"the C compiler {COMPILER!r} cannot build with {SANITIZERS[0]}")
    return ":".join(paths)


@pytest.fixture(scope="module")
def sanitized(preload: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built with sanitizers, several files at once."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = sorted((ROOT / "runtime/kernels/cpu").glob("*.c"))
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        compile_("-std=gnu11", "-O1", "-g1", "-fPIC", "-c", source, "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "_cpu_sanitized.so"
    compile_("-shared", *objects, "-o", library, "-lm")
    return library


@pytest.mark.parametrize("level", LEVELS)
def test_cases_are_clean(level: str, sanitized: Path, preload: str) -> None:
    first, step = (0, 1) if level == LEVELS[-1] else (LEVELS.index(level), LOWER_LEVELS_STEP)
    printed = run_cases(
        "every_case",
        level,
        str(first),
        str(step),
        LD_PRELOAD=preload,
        ASAN_OPTIONS="detect_leaks=0",  # Python itself leaves memory behind
        CIERZO_KERNEL_LIBRARY=str(sanitized),
    )
    assert printed.startswith(f"{level} {sanitized} ")
    assert int(printed.split()[-1]) > len(MODULES)


def test_a_fault_is_seen(sanitized: Path, preload: str) -> None:
    """The sanitizers are really there: a quantiser that is told of one column more than there are ends the process."""
    code = (
        "import ctypes, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "values = libc.malloc(31 * 4)\n"
        "room = ctypes.create_string_buffer(64)\n"
        "number = ctypes.c_int64\n"
        "function = ctypes.CDLL(sys.argv[1]).cierzo_quantize_rows\n"
        "function(ctypes.c_void_p(values), 0, number(1), number(int(sys.argv[2])), 4, 32, 0, 0, 0, room, room, None)\n"
    )
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    for columns, fault in ((31, False), (32, True)):
        command = [sys.executable, "-c", code, str(sanitized), str(columns)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == fault, done.stderr
        assert ("heap-buffer-overflow" in done.stderr) == fault
