"""The hidden folder beside the target in which a bundle is written, until one rename makes it the target.

The run that writes it holds a lock on it (flock, which the kernel lets go of when the process ends, however it ends).
A folder of this kind without a lock was left by a run that was killed: the next export to the same target removes it,
and touches nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_RANDOM = "[a-z0-9_]{8}"
"""What tempfile.mkdtemp makes names unique with."""


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, locked for the length of the block; whoever opens the block moves or removes it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # see below
        try:
            with contextlib.suppress(OSError):  # a file system without locks: there no leftover is ever removed
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(folder, descriptor):
                yield folder
                return
        finally:
            os.close(descriptor)
        # Another export took it for a leftover between its making and its locking: try again.


def hidden_like(out: Path) -> Path:
    """A path like that of the hidden folder, as long as it and never its own."""
    return out.parent / f"{_prefix(out)}{'X' * 8}"


def remove_leftovers(out: Path) -> None:
    """Remove the folders that exports to `out` left when they were killed; those of running exports stay."""
    _remove_matching(out.parent, re.escape(_prefix(out)) + _RANDOM)


def remove_all_leftovers(parent: Path) -> None:
    """The same for whatever was to be made in `parent`, a folder in which nobody else makes anything."""
    _remove_matching(parent, rf"\..+\.partial-{_RANDOM}")


def _remove_matching(parent: Path, names: str) -> None:
    pattern = re.compile(names)
    with contextlib.suppress(OSError):  # what cannot be removed, or is gone meanwhile, is in nobody's way
        for entry in sorted(parent.iterdir()):
            if pattern.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                _remove_unlocked(entry)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _remove_unlocked(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(folder, descriptor):
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # locked by a running export, or a file system without locks
    finally:
        os.close(descriptor)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether the open folder is still the one of that name: it may have been renamed or removed since."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False
