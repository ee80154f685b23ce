"""Compiles the stand-in for a given CUDA provider: its own list of libraries and symbols says what there has to be."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.cuda_cpu import compiler

HERE = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
SOURCES: Mapping[str, Sequence[str]] = {
    "libcudart": ("journal.cpp", "capture.cpp", "device.cpp", "memory.cpp", "launch.cpp"),
    "libcublas": ("cublas.cpp",),
    "libcublasLt": ("cublaslt.cpp",),
    "libcurand": (),
    "libcuda": ("driver.cpp",),
}
"""By library, without what follows ".so" in its name. The first keeps the journal, and the others are linked to it."""
SYMBOLS = {
    "libcudart": r"(__)?cuda[A-Z]",
    "libcublasLt": r"cublasLt",
    "libcublas": r"cublas(?!Lt)",
    "libcurand": r"curand",
    "libcuda": r"cu[A-Z]",
}


class StandInError(AssertionError):
    """The stand-in cannot be built for this provider; says what it lacks."""


def stand_in_libraries(provider: Path) -> Path:
    """The folder with the libraries that the provider (libonnxruntime_providers_cuda.so) is linked to.

    Compiled once for the same sources, compiler and provider. Functions that the provider calls and the stand-in lacks
    end the process when they are called, with their name, since the provider does not load without them all.

    Raises StandInError if there is no compiler, or the provider is linked to a library of CUDA's that is not here.
    """
    return _built(provider, provider.stat().st_mtime_ns)


@functools.cache
def _built(provider: Path, _mtime: int) -> Path:
    names = _libraries(provider)
    wanted = _symbols(provider, "--dynamic", "--undefined-only")
    key = hashlib.sha256(repr((names, sorted(wanted), FLAGS, _tool(*compiler().split(), "--version"))).encode())
    for file in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), HERE / "build.py"]):
        key.update(hashlib.sha256(file.read_bytes()).digest())
    top = Path(tempfile.gettempdir()) / f"cierzo-cuda-stand-in-{os.getuid()}"
    top.mkdir(mode=0o700, exist_ok=True)
    folder = top / key.hexdigest()[:32]
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=top) as own:  # several processes may build it at once: the first one stays
        built = Path(own) / "lib"
        built.mkdir()
        for stem in SOURCES:
            _compile(stem, names, wanted, built)
        try:
            built.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return folder


def _libraries(provider: Path) -> dict[str, str]:
    """The full name of each library, as "libcudart" -> "libcudart.so.13"."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", _tool("readelf", "--dynamic", "--wide", str(provider)))
    names = {name.partition(".so")[0]: name for name in needed}
    cuda = {stem: name for stem, name in names.items() if re.match(r"lib(cu|nv)", stem)}
    if unknown := sorted(set(cuda) - set(SOURCES)):
        raise StandInError(f"{provider.name} is linked to {unknown}, which the stand-in for CUDA does not have.")
    return {stem: cuda.get(stem, f"{stem}.so") for stem in SOURCES}


def _compile(stem: str, names: Mapping[str, str], wanted: frozenset[str], folder: Path) -> None:
    version = folder.parent / f"{stem}.map"
    # NVIDIA's version nodes are named after the library; the driver's has none, and any version satisfies that.
    version.write_text(f"{names[stem]} {{ global: cu*; __cu*; stand_in_*; local: *; }};\n", encoding="utf-8")
    journal = [] if stem == "libcudart" else [str(folder / names["libcudart"])]
    objects = [_object(HERE / source, folder.parent) for source in SOURCES[stem]]
    defined = {name for file in objects for name in _symbols(file, "--defined-only")}
    missing = sorted(name for name in wanted - defined if re.match(SYMBOLS[stem], name))
    if missing:
        calls = "".join(f'CUDA_API void {name}() {{ stand_in_unknown("{name}"); }}\n' for name in missing)
        generated = folder.parent / f"{stem}_unknown.cpp"
        generated.write_text(f'#include "journal.h"\n{calls}', encoding="utf-8")
        objects.append(_object(generated, folder.parent))
    options = [f"-Wl,-soname,{names[stem]}", f"-Wl,--version-script={version}"]
    _tool(*compiler().split(), "-shared", *map(str, objects), *journal, *options, "-o", str(folder / names[stem]))


def _object(source: Path, folder: Path) -> Path:
    built = folder / f"{source.stem}.o"
    _tool(*compiler().split(), *FLAGS, f"-I{HERE}", "-c", str(source), "-o", str(built))
    return built


def _symbols(file: Path, *which: str) -> frozenset[str]:
    listed = _tool("nm", *which, str(file))
    return frozenset(line.split()[-1].partition("@")[0] for line in listed.splitlines() if line.strip())


def _tool(*command: str) -> str:
    """What the tool printed. nm and readelf come with every compiler."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise StandInError(f"{' '.join(command)} failed:\n{done.stderr[:8000]}")
    return done.stdout
