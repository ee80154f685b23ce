"""Writes a bundle: all files into a hidden folder beside the target, the manifest last, then one rename.

A run that is killed leaves at most that hidden folder; see `exporter.partial` for what becomes of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from exporter.partial import hidden_like, partial_folder
from runtime.errors import ExportError
from runtime.json_files import brief

MANIFEST_FILE = "manifest.json"


def absolute(path: str | Path) -> Path:
    """The absolute path with the user's home for `~`. Raises ExportError where no user has that name."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ExportError(
            f"{brief(str(path))} names the home of a user who is not there. Spell the path out."
        ) from error


def refuse_existing(out: Path) -> None:
    """Raises ExportError when something is at `out`, or nothing can be made there: before minutes of work."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            hidden_like(out).lstat()  # its name is the longer one
        exists, has_parent = out.exists() or out.is_symlink(), out.parent.is_dir()
    except OSError as error:
        raise ExportError(f"{brief(str(out))} cannot be made: {error.strerror}. Choose another folder.") from error
    if exists:
        raise ExportError(f"{out} exists already. Choose another folder, or remove it first; nothing was written.")
    if not has_parent:
        raise ExportError(f"{out.parent} is not a folder, so {out.name} cannot be made in it. Make it first.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ExportError(f"{out.parent} cannot be written to, so {out.name} cannot be made in it. Choose another one.")


def refuse_names(paths: Iterable[Path]) -> None:
    """Raises ExportError for a path that is no text: neither the graph nor the manifest, both UTF-8, could name it."""
    for path in paths:
        try:
            for spelled in (path, path.resolve()):
                str(spelled).encode()
        except ValueError as error:  # of resolve() for a zero byte, and of encode()
            raise ExportError(
                f"The path {str(path)!a} is not UTF-8 text, so that nothing in a bundle can name it. "
                "Rename what it leads through."
            ) from error


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
    with contextlib.ExitStack() as stack:
        try:
            partial = stack.enter_context(partial_folder(out))
        except OSError as error:
            raise ExportError(f"Writing {out} failed: {error}. Nothing was left behind.") from error
        try:
            yield partial
            for file in sorted(partial.iterdir()):
                _sync(file)
            _sync(partial)
            partial.chmod(0o755)  # a temporary folder is private
            refuse_existing(out)
            partial.rename(out)
            _sync(out.parent)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ExportError(f"Writing {out} failed: {error}. Nothing was left behind.") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The manifest as readable JSON, keys in the order given."""
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
