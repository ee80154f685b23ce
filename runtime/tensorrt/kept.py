"""Files that make the next start faster and may be lost at any time: compiled kernels and timings of the library."""

from __future__ import annotations

import tempfile
from pathlib import Path

from runtime.kernels.cuda.compiler import cache_folder


def kept_file(kind: str, name: str) -> Path:
    """Where the file `name` of that kind lies, under the folder of all caches."""
    return cache_folder().parent / kind / f"{name}.cache"


def read_kept(file: Path) -> bytes | None:
    """Its content, or None."""
    try:
        return file.read_bytes()
    except OSError:
        return None


def write_kept(file: Path, content: bytes) -> None:
    """Keep `content`, whole or not at all; where nothing can be kept, nothing is said."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as own:
            try:
                own.write(content)
                own.flush()
                Path(own.name).replace(file)
            except OSError:
                Path(own.name).unlink(missing_ok=True)
    except OSError:
        return
