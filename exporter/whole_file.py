"""Writes a small text file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.save import absolute
from runtime.errors import ExportError

REPORT, JUNIT, BASELINE = "The report", "The JUnit report", "The baseline"
"""How messages call what a validation writes."""


def write_whole(path: Path, text: str, what: str) -> None:
    """Let `path` hold `text` in UTF-8; until that is done, it keeps what it held.

    A link stays one, and what it leads to is replaced. What is no file, such as a pipe, is written into.
    what: of the sentence when it cannot be done, as in "The report". Raises ExportError.
    """
    content = text.encode("utf-8", errors="replace")  # a path may hold what is no text
    with _refusing(path, what) as target:
        if _is_stream(target):
            target.write_bytes(content)
            return
        partial = _beside(target)
        try:
            partial.write_bytes(content)
            partial.chmod(0o644)  # mkstemp makes it private
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def refuse_unwritable(path: Path, what: str) -> None:
    """Raises the ExportError of `write_whole` where it is known before there is anything to write."""
    with _refusing(path, what) as target:
        if not _is_stream(target):
            _beside(target).unlink()


@contextmanager
def _refusing(path: Path, what: str) -> Iterator[Path]:
    """Gives what `path` leads to, a stream as it is named, and turns errors of the system into sentences."""
    target = absolute(path)
    try:
        yield target if _is_stream(target) else Path(os.path.realpath(target))
    except (OSError, ValueError) as error:  # a name with a NUL or half a surrogate pair is none of a file
        raise ExportError(f"{what} {target} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def _is_stream(target: Path) -> bool:
    return target.exists() and not target.is_file() and not target.is_dir()


def _beside(target: Path) -> Path:
    """A new empty file in the folder of `target`."""
    if target.is_dir():
        raise IsADirectoryError(21, "Is a directory")
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    os.close(handle)
    return Path(name)
