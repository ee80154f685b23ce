"""Writes a small text file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from exporter.save import absolute
from runtime.errors import ExportError


def write_whole(path: Path, text: str, what: str) -> None:
    """Let `path` hold `text` in UTF-8; until that is done, it keeps what it held.

    what: of the sentence when it cannot be done, as in "The report". Raises ExportError.
    """
    target = absolute(path)
    partial: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        partial = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:  # a path may hold what is no text
            file.write(text)
        partial.chmod(0o644)  # mkstemp makes it private
        partial.replace(target)
    except OSError as error:
        raise ExportError(f"{what} {target} cannot be written: {error.strerror or error}.") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
