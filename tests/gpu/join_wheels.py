"""Joins the parts that `python -m tests.gpu.wheels pack` made, and installs the wheels in them.

    python join.py [FOLDER ...] --keep KEEP --target TARGET

Runs with nothing but Python and pip, without network, and may be called as often as parts arrive: each call takes what
the folders hold (by default the one that this file lies in) into KEEP, and says what is still missing. When all parts
are there and their sums are right, the wheels are installed into TARGET, to be put into PYTHONPATH.

Exit codes: 0 installed, 1 something is damaged or pip refused, 3 parts are missing.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "wheels.json"
INSTALLED, DAMAGED, MISSING = 0, 1, 3
_BLOCK = 1 << 20


class JoinError(Exception):
    """What keeps the parts from being joined, in a sentence."""


def read_manifest(folders: Sequence[Path]) -> dict[str, Any]:
    """The first manifest in the folders: parts and wheels, each with `file`, `bytes` and `sha256`."""
    for folder in folders:
        if (folder / MANIFEST).is_file():
            found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return found
    raise JoinError(f"{MANIFEST} is in none of {', '.join(map(str, folders))}: bring it along with the parts.")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the file is there and is what its entry in the manifest says."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]


def gather(manifest: Mapping[str, Any], folders: Sequence[Path], keep: Path) -> tuple[list[str], list[str]]:
    """Take parts from the folders into `keep`. Returns the names of those missing, and a line for each damaged one."""
    keep.mkdir(parents=True, exist_ok=True)
    missing, damaged = [], []
    for part in manifest["parts"]:
        kept = keep / part["file"]
        if is_whole(kept, part):
            continue
        found = [folder / part["file"] for folder in folders if (folder / part["file"]).is_file()]
        whole = next((path for path in found if is_whole(path, part)), None)
        if whole is not None:
            copied = kept.with_suffix(".partial")
            shutil.copyfile(whole, copied)
            os.replace(copied, kept)
            continue
        missing.append(part["file"])
        damaged += [f"{path} is not the part that was packed: carry it again." for path in found]
    return missing, damaged


def unpack(manifest: Mapping[str, Any], keep: Path) -> list[Path]:
    """The wheels, written into `keep`/wheels from its parts, which are one stream. Raises JoinError for a wrong sum."""
    folder = keep / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stream = _blocks([keep / part["file"] for part in manifest["parts"]])
    left, wheels = b"", []
    for wheel in manifest["wheels"]:
        wheels.append(folder / wheel["file"])
        with wheels[-1].open("wb") as file:
            left = _fill(file, wheel["bytes"], left, stream)
        if not is_whole(wheels[-1], wheel):
            raise JoinError(f"{wheel['file']} has another sum than when it was packed. Pack it again.")
    return wheels


def _blocks(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                yield block


def _fill(file: BinaryIO, count: int, left: bytes, stream: Iterator[bytes]) -> bytes:
    """Write `count` bytes, the first of them from `left`; returns what is left of the last block."""
    while count:
        block = left or next(stream, b"")
        if not block:
            raise JoinError(f"The parts end before {file.name} does. Pack them again.")
        file.write(block[:count])
        count, left = count - len(block[:count]), block[count:]
    return left


def install(wheels: Sequence[Path], target: Path) -> None:
    """By pip, from these files alone. Raises JoinError with what pip says."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(target)]
    done = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise JoinError(f"pip refused: {' '.join(done.stderr.split())}")


def join(folders: Sequence[Path], keep: Path, target: Path) -> int:
    """Everything; returns the exit code and prints what happened."""
    try:
        manifest = read_manifest([*folders, keep])
        mark = target / MANIFEST
        if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == manifest:
            print(f"These wheels are installed already: export PYTHONPATH={target}")
            return INSTALLED
        missing, damaged = gather(manifest, folders, keep)
        # Kept as well, so that the last call needs no more than the last part.
        (keep / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for line in damaged:
            print(line)
        if missing:
            count = len(manifest["parts"])
            print(f"{count - len(missing)} of {count} parts are in {keep}. Missing: {', '.join(missing)}.")
            return DAMAGED if damaged else MISSING
        wheels = unpack(manifest, keep)
        install(wheels, target)
        mark.write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(keep / "wheels")
    except JoinError as error:
        print(error)
        return DAMAGED
    print(f"Installed {', '.join(wheel.name for wheel in wheels)}: export PYTHONPATH={target}")
    return INSTALLED


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=description)
    here = Path(__file__).resolve().parent
    parser.add_argument("folders", nargs="*", type=Path, help="where parts lie (default: beside this file)")
    parser.add_argument("--keep", type=Path, required=True, help="a folder that outlives the calls, for the parts")
    parser.add_argument("--target", type=Path, required=True, help="where the packages are installed")
    given = parser.parse_args(arguments)
    return join(given.folders or [here], given.keep, given.target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
