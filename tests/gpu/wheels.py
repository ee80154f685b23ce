"""Packs packages that a GPU machine without network lacks into parts that can be carried one by one.

    python -m tests.gpu.wheels pack OUT NAME==VERSION ... [--python 3.12] [--part-mb 48] [--find-links FOLDER]
    python -m tests.gpu.wheels join [FOLDER ...] --keep KEEP --target TARGET

`pack` fetches a wheel of each package for x86-64 Linux, no dependencies (name those that are missing there as well),
and writes OUT/part-000 and so on, OUT/wheels.json with the sums, and OUT/join.py, which does over there what `join`
does here and needs nothing of this repository. What is fetched and written already is not fetched and written again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.gpu import join_wheels
from tests.gpu.join_wheels import DAMAGED, MANIFEST, JoinError, is_whole, sha256_of

PART_MB, PYTHON = 48, "3.12"
_NEWEST_GLIBC = 39
"""Of the machines that wheels are for: 2.39, and a wheel for an older one runs there too."""
_PINNED = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._+!-]+)")


class PackError(JoinError):
    """What keeps packages from being packed, in a sentence."""


def fetch(requirements: Sequence[str], folder: Path, python: str, find_links: Path | None = None) -> list[Path]:
    """One wheel in `folder` for each NAME==VERSION, by pip. find_links: a folder to take them from instead of an index.

    Raises PackError for other spellings and with what pip says.
    """
    pinned = []
    for requirement in requirements:
        match = _PINNED.fullmatch(requirement)
        if match is None:
            raise PackError(f"{requirement!r} names no version: give NAME==VERSION, so that both sides mean one wheel.")
        pinned.append((requirement, *match.groups()))
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for platform in platforms():
        command += ["--platform", platform]
    command += [] if find_links is None else ["--no-index", "--find-links", str(find_links)]
    wanted = [requirement for requirement, name, version in pinned if len(_wheels(folder, name, version)) != 1]
    if wanted:
        done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PackError(f"pip did not fetch {', '.join(wanted)}: {' '.join(done.stderr.split())[-600:]}")
    return [_only(requirement, _wheels(folder, name, version)) for requirement, name, version in pinned]


def platforms() -> Iterator[str]:
    """The tags of x86-64 Linux with glibc; pip takes a tag only if it is named."""
    yield from (f"manylinux_2_{minor}_x86_64" for minor in range(_NEWEST_GLIBC, 4, -1))
    yield from (f"manylinux{year}_x86_64" for year in (2014, 2010, 1))


def _wheels(folder: Path, name: str, version: str) -> list[Path]:
    return [path for path in sorted(folder.glob("*.whl")) if _names(path) == (_normal(name), version)]


def _names(wheel: Path) -> tuple[str, str]:
    name, version, *_ = wheel.name.split("-")
    return _normal(name), version


def _normal(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _only(requirement: str, found: Sequence[Path]) -> Path:
    if len(found) != 1:
        raise PackError(f"{requirement} is {len(found)} wheels ({', '.join(path.name for path in found)}), not one.")
    return found[0]


def write_parts(wheels: Sequence[Path], out: Path, part_bytes: int) -> dict[str, Any]:
    """Cut the wheels, one after the other, into parts of at most `part_bytes`, and write the manifest and join.py.

    A part that is there already stays; parts of another packing go.
    """
    files = [{"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in wheels]
    manifest: dict[str, Any] = {"wheels": files, "parts": []}
    for index, block in enumerate(_parts(wheels, part_bytes)):
        path = out / f"part-{index:03d}"
        written = path.with_suffix(".partial")
        written.write_bytes(block)
        entry = {"file": path.name, "bytes": len(block), "sha256": sha256_of(written)}
        if is_whole(path, entry):
            written.unlink()
        else:
            os.replace(written, path)
        manifest["parts"].append(entry)
    names = {part["file"] for part in manifest["parts"]}
    for path in out.glob("part-*"):
        if path.name not in names:
            path.unlink()
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(join_wheels.__file__, out / "join.py")
    return manifest


def _parts(wheels: Sequence[Path], part_bytes: int) -> Iterator[bytes]:
    block = b""
    for path in wheels:
        with path.open("rb") as stream:
            while piece := stream.read(part_bytes - len(block)):
                block += piece
                if len(block) == part_bytes:
                    yield block
                    block = b""
    if block:
        yield block


def pack(
    out: Path,
    requirements: Sequence[str],
    *,
    python: str = PYTHON,
    part_bytes: int = PART_MB * 1_000_000,
    find_links: Path | None = None,
) -> dict[str, Any]:
    """Fetch and cut; returns the manifest. Raises PackError."""
    return write_parts(fetch(requirements, out / "wheels", python, find_links), out, part_bytes)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if list(arguments[:1]) == ["join"]:
        return join_wheels.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.wheels", description=(__doc__ or "").splitlines()[0])
    packing = parser.add_subparsers(required=True).add_parser("pack", help="fetch wheels and cut them into parts")
    packing.add_argument("out", type=Path)
    packing.add_argument("requirements", nargs="+", metavar="NAME==VERSION")
    packing.add_argument("--python", default=PYTHON, help=f"version over there (default: {PYTHON})")
    packing.add_argument("--part-mb", type=float, default=PART_MB, help=f"of a part at most (default: {PART_MB})")
    packing.add_argument("--find-links", type=Path, help="take wheels from this folder and from no index")
    given = parser.parse_args(arguments)
    try:
        manifest = pack(
            given.out,
            given.requirements,
            python=given.python,
            part_bytes=int(given.part_mb * 1e6),
            find_links=given.find_links,
        )
    except JoinError as error:
        print(error)
        return DAMAGED
    for part in manifest["parts"]:
        print(f"{given.out / part['file']}  {part['bytes'] / 1e6:.1f} MB")
    print(
        f"Carry them with {MANIFEST} and join.py. Over there, for each part or for several at once: "
        "python join.py --keep KEEP --target TARGET"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
