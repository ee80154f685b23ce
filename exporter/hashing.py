"""What the manifest records of files: sizes and hashes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from exporter.defaults import HASHING
from reference.hub_cache import known_sha256
from runtime.hashing import blocks_sha256_of, sha256_of

Progress = Callable[[str, int, int], None]


def own_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one of the bundle's own files."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def small_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a small file of the checkpoint."""
    return large_entry(path, sha256_of(path))


def large_entries(
    files: Collection[Path], *, hashes: bool, progress: Progress | None = None
) -> dict[Path, dict[str, Any]]:
    """Sizes of a checkpoint's tensor files, and of each its SHA-256 if a hub cache names it, else its block hash.

    hashes: False records none but those that are known without reading. progress: in bytes.
    """
    known = {file: known_sha256(file) for file in files}
    unknown = [file for file, sha256 in known.items() if sha256 is None] if hashes else []
    total, done = sum(file.stat().st_size for file in unknown), 0
    blocks: dict[Path, str] = {}
    for file in unknown:

        def report(of_file: int, before: int = done) -> None:
            if progress is not None:
                progress(HASHING, before + of_file, total)

        blocks[file] = blocks_sha256_of(file, report)
        done += file.stat().st_size
    return {file: large_entry(file, known[file], blocks.get(file)) for file in files}


def large_entry(path: Path, sha256: str | None, blocks_sha256: str | None = None) -> dict[str, Any]:
    """Size of a file, and its hashes as far as they are known."""
    return {"bytes": path.stat().st_size, "sha256": sha256, "blocks_sha256": blocks_sha256}
