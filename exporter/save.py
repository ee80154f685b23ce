"""Writes a bundle: all files into a hidden folder beside the target, the manifest last, then one rename.

A run that is killed leaves at most that hidden folder, which has no manifest and does not load.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import ExportError

MANIFEST_FILE = "manifest.json"
_HASHED_AT_ONCE = 1 << 20


def refuse_existing(out: Path) -> None:
    """Raises ExportError when something is at `out`, or when the folder that should hold it is not there."""
    if out.exists() or out.is_symlink():
        raise ExportError(f"{out} exists already. Choose another folder, or remove it first; nothing was written.")
    if not out.parent.is_dir():
        raise ExportError(f"{out.parent} is not a folder, so {out.name} cannot be made in it. Make it first.")


def refuse_full_disk(out: Path, nbytes: int) -> None:
    """Raises ExportError when the disk of `out` has less than `nbytes` left."""
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise ExportError(
            f"The bundle needs {nbytes / 1e9:.2f} GB and the disk of {out.parent} has {free / 1e9:.2f} GB left. "
            "Choose another place or free some space; nothing was written."
        )


@contextlib.contextmanager
def bundle_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` in one step when the block ends without an exception.

    Raises ExportError when the operating system refuses a write, for instance because the disk is full.
    """
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield partial
        for file in sorted(partial.iterdir()):
            _sync(file)
        _sync(partial)
        partial.chmod(0o755)  # mkdtemp makes it private
        refuse_existing(out)
        partial.rename(out)
        _sync(out.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ExportError(f"Writing {out} failed: {error}. Nothing was left behind.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def file_entry(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Size and hash of a file, as the manifest records them; `sha256` if it is known already."""
    if sha256 is None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_HASHED_AT_ONCE):
                digest.update(block)
        sha256 = digest.hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The manifest as readable JSON, keys in the order given."""
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
