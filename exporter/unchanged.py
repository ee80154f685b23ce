"""Holds an export to the checkpoint that it opened: its files must be the same ones, unchanged, when all is written.

Between reading the headers and making the links lie seconds of tracing. A download that replaces a shard meanwhile
would leave a graph with the places of the old file beside the bytes and the hash of the new one: a bundle that loads,
verifies and computes something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from runtime.errors import ExportError

State = tuple[int, int]
"""Bytes, and nanosecond of the last change of the content. Not the inode, which some file systems renumber."""


def states_of(files: Collection[Path]) -> Mapping[Path, State]:
    """What to compare later. Raises ExportError for a file that is gone already."""
    return {file: _state(file) for file in files}


def require_unchanged(before: Mapping[Path, State]) -> None:
    """Raises ExportError when one of the files is not what it was."""
    for file, state in before.items():
        if _state(file) != state:
            raise _changed(file, "was changed or replaced")


def _state(file: Path) -> State:
    try:
        found = file.stat()
    except OSError as error:
        raise _changed(file, f"can no longer be found ({error.strerror or error})") from error
    return found.st_size, found.st_mtime_ns


def _changed(file: Path, what: str) -> ExportError:
    return ExportError(
        f"{file} {what} while it was exported. Let whoever writes the checkpoint finish, and export again; nothing "
        "was left behind."
    )
