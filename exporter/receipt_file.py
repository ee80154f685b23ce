"""Changes `parity.json` of a bundle: under a lock, so that two runs at once both keep their receipts, and in one step.

The lock is on the bundle's folder (flock, which the kernel lets go of when a process ends, however it ends).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runtime.errors import BundleError
from runtime.json_files import MOST_BYTES, open_regular_file
from runtime.parity_file import receipts_file, sound_receipts
from runtime.parity_receipt import RECEIPTS_FILE, Receipt

_PREFIX = f".{RECEIPTS_FILE}."
_LEFTOVER = re.compile(re.escape(_PREFIX) + "[a-z0-9_]{8}")
"""What tempfile.mkstemp makes of the prefix: a file that a killed run left."""


def require_writable(folder: Path) -> None:
    """Raises BundleError where `change_receipts` could not do its work: before hours of a validation."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refused(folder, "this user may not write into the folder")
    _receipts(folder)


def change_receipts(folder: Path, change: Callable[[Sequence[Receipt]], Sequence[Receipt]]) -> int:
    """Let `parity.json` hold what `change` makes of its receipts, of which damaged ones are left out; none, no file.

    Returns how many receipts fewer there are. Raises BundleError where the file cannot be written, or holds receipts
    of a later version of Cierzo.
    """
    try:
        with _locked(folder) as alone:
            old = _receipts(folder)
            new = change(old)
            if alone:
                _remove_leftovers(folder)
            path = folder / RECEIPTS_FILE
            if not new:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.read_bytes() != receipts_file(new):
                _replace(path, receipts_file(new))
    except OSError as error:
        raise _refused(folder, error.strerror or str(error)) from error
    return len(old) - len(new)


def _receipts(folder: Path) -> tuple[Receipt, ...]:
    try:
        with open_regular_file(folder / RECEIPTS_FILE) as stream:
            return sound_receipts(stream.read(MOST_BYTES + 1))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise _refused(folder, error.strerror or str(error)) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Gives whether nobody else can be in here; a file system without locks leaves that to luck."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=_PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(folder: Path, cause: str) -> BundleError:
    return BundleError(
        f"The receipt of parity cannot be written into {folder}: {cause}. Validate a copy of the bundle that can be "
        "written to, or pass --no-receipt."
    )
