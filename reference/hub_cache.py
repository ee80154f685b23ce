"""Checkpoint folders as a hub client leaves them on disk, with links into a store of blobs.

    models--org--name/
        refs/main                           the commit that the branch main had when it was downloaded last
        snapshots/<commit>/config.json      a link to ../../blobs/<hash>
        blobs/<hash>                        the content; <hash> is its SHA-256 for large files, a git hash for small
        blobs/<hash>.incomplete             what a download that was cut off has left

Links are followed when a file is opened and kept otherwise, so that every message names the path that the user knows.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from reference.messages import some
from runtime.errors import CheckpointError

_BRANCH = Path("refs", "main")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = ".incomplete"


def snapshot_of(folder: Path) -> Path:
    """`folder` itself, or for a whole `models--org--name` the snapshot of refs/main (the only one if there is no ref).

    Raises CheckpointError when the ref names a snapshot that is not there, or leaves a choice between several.
    """
    if not (folder / "snapshots").is_dir() or not folder.name.startswith("models--"):
        return folder
    snapshots = sorted(entry.name for entry in (folder / "snapshots").iterdir() if entry.is_dir())
    if (folder / _BRANCH).is_file():
        commit = (folder / _BRANCH).read_bytes()[:1000].decode("utf-8", "replace").strip()
        if commit not in snapshots:
            raise CheckpointError(
                f"{folder / _BRANCH} names the snapshot {commit!r}, which is not among those that were downloaded "
                f"({some(snapshots, 3) or 'none'}). Download it, or give the folder of a snapshot."
            )
        return folder / "snapshots" / commit
    if len(snapshots) == 1:
        return folder / "snapshots" / snapshots[0]
    raise CheckpointError(
        f"{folder} has no {_BRANCH.as_posix()} and "
        + (f"{len(snapshots)} snapshots ({some(snapshots, 3)})" if snapshots else "no snapshot")
        + ", so it does not say which one is meant. "
        + ("Give the folder of one of them." if snapshots else "Download the checkpoint.")
    )


def is_listed(file: Path) -> bool:
    """Whether the folder has an entry for `file`, be it a link to a file that is not there."""
    return file.is_file() or file.is_symlink()


def require_target(file: Path) -> None:
    """Raise CheckpointError when `file` is a link that leads nowhere: its download was not finished."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file} is a link to {os.readlink(file)}, which is not there{unfinished(file.parent)}. "
            "Finish the download of this checkpoint."
        )


def unfinished(folder: Path) -> str:
    """Words for a message that lacks a file: which parts of downloads lie beside the checkpoint, or nothing."""
    stores = [folder, folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":
        stores.append(folder.parent.parent / "blobs")
    parts = sorted(entry.name for store in stores if store.is_dir() for entry in store.iterdir())
    parts = [name for name in parts if name.endswith(_PART)]
    return f" (unfinished downloads: {some(parts, 2)})" if parts else ""


def known_sha256(file: Path) -> str | None:
    """The SHA-256 of the content of `file` in hex, if a hub cache has named its blob by it; else None.

    Nothing is read, so the hash is what the file was downloaded as. `file.resolve()` is the blob itself.
    """
    blob = file.resolve()
    return blob.name if file.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None
