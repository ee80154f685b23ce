"""Where an engine lies in its bundle, and how it gets there: whole or not at all.

    BUNDLE/engines/NAME/prefill.plan decode.plan kernels.json engine.json

All is written into a hidden folder beside the target, which one rename makes the target; then the manifest lists it.
A folder that the manifest does not list is not there for anybody, so a build that is killed leaves nothing that looks
whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.hashing import own_entry
from exporter.partial import partial_folder, remove_all_leftovers
from exporter.save import MANIFEST_FILE
from runtime.bundle import Bundle
from runtime.engine_info import ENGINE_FILE, ENGINES_FOLDER
from runtime.errors import BackendError, BundleError
from runtime.json_files import parse_json_object


@contextlib.contextmanager
def engine_folder(bundle: Bundle, name: str) -> Iterator[Path]:
    """A folder to write an engine into, ENGINE_FILE included, which becomes the bundle's engine `name` at the end.

    An engine of that name is replaced. Raises BackendError when the operating system refuses a write.
    """
    engines = bundle.path / ENGINES_FOLDER
    target = engines / name
    with contextlib.ExitStack() as stack:
        try:
            engines.mkdir(exist_ok=True)
            remove_all_leftovers(engines)
            partial = stack.enter_context(partial_folder(target))
        except OSError as error:
            raise _refused(bundle, error) from error
        try:
            yield partial
            for file in sorted(partial.iterdir()):
                _sync(file)
            _sync(partial)
            partial.chmod(0o755)  # a temporary folder is private
            _publish(bundle, partial, target)
        except OSError as error:
            raise _refused(bundle, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other engines, or this one
                engines.rmdir()


def _publish(bundle: Bundle, partial: Path, target: Path) -> None:
    """Move the folder into its place and list it; builds of other engines of this bundle wait meanwhile."""
    with _locked(target.parent):
        if target.exists():
            _list(bundle, target.name, None)  # what is listed is whole, at every moment
            # Under the name of an unfinished one: should this be killed here, the next build removes it.
            with partial_folder(target) as old:
                target.rename(old / target.name)
                shutil.rmtree(old, ignore_errors=True)
        entry = own_entry(partial / ENGINE_FILE)
        partial.rename(target)
        try:
            _sync(target.parent)
            _list(bundle, target.name, entry)
        except BaseException:
            if target.name not in _document(bundle).get("engines", {}):
                shutil.rmtree(target, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _document(bundle: Bundle) -> dict[str, Any]:
    return parse_json_object(
        (bundle.path / MANIFEST_FILE).read_bytes(),
        lambda cause: BundleError(f"The manifest is not readable JSON ({cause}). Export the checkpoint again."),
    )


def _list(bundle: Bundle, name: str, entry: dict[str, Any] | None) -> None:
    """Let the manifest have `entry` for the engine `name`, or none, and no engine whose folder was deleted.

    All else in it stays as it is.
    """
    path, document = bundle.path / MANIFEST_FILE, _document(bundle)
    engines = {
        key: value
        for key, value in document.get("engines", {}).items()
        if key != name and os.path.isdir(bundle.path / ENGINES_FOLDER / key)
    }
    if entry is not None:
        engines[name] = entry
    document.pop("engines", None)
    if engines:
        document["engines"] = engines
    descriptor, temporary = tempfile.mkstemp(prefix=f".{MANIFEST_FILE}.", dir=bundle.path)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        os.chmod(temporary, path.stat().st_mode & 0o777)
        _sync(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync(bundle.path)


def _refused(bundle: Bundle, error: OSError) -> BackendError:
    return BackendError(
        f"The engine cannot be written into {bundle.path}: {error.strerror or error}. Engines lie in their bundle, so "
        "build where it can be written to."
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
