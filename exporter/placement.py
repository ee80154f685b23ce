"""Where the bytes of a bundle's weights are: copied into it, linked into it, or left in the checkpoint's folder.

A hard link is a second name of the same file: it takes no space, the bundle is whole by itself, and it stays whole when
the checkpoint's folder is deleted. Symbolic links would not do, since ONNX Runtime reads nothing outside of the folder
that it is given. Where the file system refuses hard links (another disk, no rights), the manifest names the folder
instead, and the runtime hands it to the engine; all files must then lie in that one folder under the graph's names.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ExportError
from runtime.manifest import COPIED, FOLDER, LINKED

_REFUSALS = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
)
"""Answers to link(2) that mean that this file cannot be linked there, and not that something else is wrong."""


@dataclass(frozen=True, slots=True)
class Placement:
    """kind: as in the manifest. names: for each checkpoint file that is referenced, its name for the graph.

    folder: where the files lie if not in the bundle, without any symbolic link in its path.
    """

    kind: str
    names: Mapping[Path, str]
    folder: Path | None = None


IN_THE_BUNDLE = Placement(COPIED, {})


def foresee(files: Collection[Path], out: Path) -> None:
    """Raises ExportError now if it is clear by now that `place` will refuse: before anything takes time."""
    if any(file.stat().st_dev != out.parent.stat().st_dev for file in files):
        _one_folder(files, os.strerror(errno.EXDEV))


def place(files: Collection[Path], folder: Path, taken: Collection[str]) -> Placement:
    """Link the checkpoint's `files` into the bundle's `folder`, all of them, or else none and name their folder.

    taken: names that other files of the bundle have.
    Raises ExportError when they can neither be linked nor be named, and OSError when linking fails for another reason.
    """
    names = _link_names(files)
    _refuse_clash(names, taken)
    made: list[Path] = []
    try:
        for file, name in names.items():
            os.link(file.resolve(), folder / name)
            made.append(folder / name)
    except OSError as error:
        for link in made:
            link.unlink()
        if error.errno not in _REFUSALS:
            raise
        named = _one_folder(files, error.strerror or str(error))
        _refuse_clash(named.names, taken)
        return named
    return Placement(LINKED, names)


def _refuse_clash(names: Mapping[Path, str], taken: Collection[str]) -> None:
    clash = sorted(set(names.values()) & set(taken))
    if clash:
        raise ExportError(
            f"The checkpoint's {clash[0]} cannot be referenced, as the bundle has a file of that name itself. Pass "
            "--copy (copy=True) to copy the weights into the bundle."
        )


def _link_names(files: Collection[Path]) -> dict[Path, str]:
    """The files' own names: a hub cache's symbolic links are readable, and the blobs behind them are not.

    Two files of one name (in different folders) get the names of the real files instead.
    """
    own = [file.name for file in files]
    return {file: file.name if own.count(file.name) == 1 else file.resolve().name for file in files}


def _one_folder(files: Collection[Path], reason: str) -> Placement:
    real = {file: file.resolve() for file in files}
    folders = sorted({file.parent for file in real.values()})
    if len(folders) > 1:
        raise ExportError(
            f"The checkpoint's files cannot be linked into the bundle ({reason}), and cannot be left where they are "
            f"either, as they lie in {len(folders)} folders ({folders[0]}, {folders[1]}) and an engine takes one. Pass "
            "--copy (copy=True) to copy the weights into the bundle, or choose a folder on the checkpoint's disk."
        )
    return Placement(FOLDER, {file: path.name for file, path in real.items()}, folders[0])
