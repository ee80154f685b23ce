"""Reading a bundle from disk: a folder with `manifest.json` and the files that it lists.

The manifest is written last, so a folder without one is an export that was killed, and no bundle.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runtime.errors import BundleError
from runtime.hashing import blocks_sha256_of, sha256_of
from runtime.json_files import brief, open_regular_file
from runtime.manifest import FileInfo, Manifest, parse_manifest

MANIFEST_NAME = "manifest.json"
_MOST_MANIFEST_BYTES = 1 << 24
VERIFYING = "verifying"
"""The stage that is reported while hashes are compared, in bytes."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files were all found with the sizes that its manifest gives. Both paths are absolute.

    weights_folder: where the files of `manifest.weights.files` lie, `path` itself or the checkpoint's own folder.
    unverified: files that could not be verified on request, since the manifest has no hash of them.
    """

    path: Path
    manifest: Manifest
    weights_folder: Path
    unverified: tuple[str, ...] = ()

    def file(self, name: str) -> Path:
        """Where the file `name` of the manifest lies."""
        return (self.weights_folder if name in self.manifest.weights.files else self.path) / name


def read_bundle(
    path: str | os.PathLike[str],
    *,
    verify: bool = False,
    weights_folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Read and validate the bundle in the folder `path`.

    verify: also read every byte and compare the hashes (for a 7B model that takes a minute, so it is not the default).
    weights_folder: where the files with weights lie, if not where the manifest says.
    progress: called with (stage, done, total) in bytes while hashes are compared.

    Raises BundleError for a folder that is missing or has no manifest, for a manifest that `parse_manifest` refuses,
    and for files that are missing, lie outside the folder, or differ in size or hash.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"There is no bundle at {folder}: the folder does not exist. Make one with `cierzo export`.")
    try:
        with open_regular_file(folder / MANIFEST_NAME) as stream:
            content = stream.read(_MOST_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(
            f"The folder {folder} is no bundle: it has no {MANIFEST_NAME}, which an export writes last. If it is a "
            "checkpoint, export it first; if an export was interrupted here, delete the folder and export again."
        ) from None
    except OSError as error:
        raise BundleError(f"The manifest {folder / MANIFEST_NAME} cannot be read: {error}.") from error
    manifest = parse_manifest(content)
    # Absolute, because files such as the tokenizer are read later and the process may change its folder until then.
    bundle = Bundle(folder.absolute(), manifest, _weights_folder(folder.absolute(), manifest, weights_folder))
    for name, expected in manifest.files.items():
        _check_size(bundle, bundle.path, name, expected)
    for name, expected in manifest.weights.files.items():
        _check_size(bundle, bundle.weights_folder, name, expected)
        _check_place(bundle.weights_folder, name)
    return verified(bundle, progress) if verify else bundle


def verified(bundle: Bundle, progress: Progress | None = None) -> Bundle:
    """The bundle, after every byte was read and every hash compared; `unverified` names the files that have none.

    Raises BundleError for a file whose hash differs.
    """
    return Bundle(bundle.path, bundle.manifest, bundle.weights_folder, _verify(bundle, progress))


def _weights_folder(folder: Path, manifest: Manifest, asked: str | os.PathLike[str] | None) -> Path:
    """Where the weights lie; raises BundleError when that folder is not there."""
    if asked is None and manifest.weights.folder is None:
        return folder
    place = Path(asked if asked is not None else str(manifest.weights.folder))
    try:
        place = place.expanduser() if asked is not None else place
        found = place.is_dir() and (asked is not None or place.is_absolute())
    except (OSError, ValueError, RuntimeError):  # no name of a folder at all, or the home of nobody
        found = False
    if not found:
        raise BundleError(
            f"The weights of the bundle {folder} are to lie in the folder {brief(str(place))}, which is not there. "
            "If it was moved, name it with --weights-folder (weights_folder= of `load`); otherwise export the "
            "checkpoint again, with --copy if the bundle is to hold its weights itself."
        )
    return place.absolute()


def _check_size(bundle: Bundle, folder: Path, name: str, expected: FileInfo) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name or not relative.parts:
        raise BundleError(f"The manifest lists the file {brief(name)}, which lies outside the bundle. Export again.")
    file = folder / relative
    try:
        found = file.is_file()
    except OSError:  # a name that is too long for a file
        found = False
    if not found:
        raise BundleError(
            f"The bundle {bundle.path} lacks the file {brief(name)[1:-1]} that its manifest "
            f"lists{_place(bundle, folder)}. {_way_out(bundle, folder)}"
        )
    if not os.access(file, os.R_OK):  # a link has the rights of the checkpoint's file, whatever the bundle's are
        raise BundleError(
            f"{file} cannot be read: this user has no right to. Ask its owner for it, or copy the bundle."
        )
    size = file.stat().st_size
    if size != expected.bytes:
        raise BundleError(
            f"The file {name} of the bundle {bundle.path} has {size} bytes{_place(bundle, folder)}, but its manifest "
            f"says {expected.bytes}: it was truncated or changed. {_way_out(bundle, folder)}"
        )


def _check_place(folder: Path, name: str) -> None:
    """An engine takes weights out of the one folder that it is given, be it the bundle's or another."""
    file = folder / name
    real = file.resolve()
    if real.parent == folder.resolve():
        return
    way_out = (
        f"Name the folder of the real files ({real.parent}) with --weights-folder."
        if real.name == file.name
        else f"Put the file itself, or a hard link to it, there as {file.name}."
    )
    raise BundleError(
        f"{file} is a link to {real}, and ONNX Runtime reads weights from the folder that it is given only. {way_out}"
    )


def _place(bundle: Bundle, folder: Path) -> str:
    return "" if folder == bundle.path else f" in {folder}"


def _way_out(bundle: Bundle, folder: Path) -> str:
    if folder == bundle.path:
        return "Copy the bundle again, completely, or export the checkpoint again."
    return (
        "Restore the checkpoint there, name its folder with --weights-folder (weights_folder= of `load`) if it was "
        "moved, or export the checkpoint again."
    )


def _verify(bundle: Bundle, progress: Progress | None) -> tuple[str, ...]:
    """Compare every hash; returns the names of the files that have none. Raises BundleError for one that differs."""
    listed = [
        (folder, name, info)
        for folder, files in (
            (bundle.path, bundle.manifest.files),
            (bundle.weights_folder, bundle.manifest.weights.files),
        )
        for name, info in files.items()
    ]
    total = sum(info.bytes for _, _, info in listed if info.sha256 or info.blocks_sha256)
    done = 0
    for folder, name, info in listed:

        def report(of_file: int, before: int = done) -> None:
            if progress is not None:
                progress(VERIFYING, before + of_file, total)

        try:
            if info.sha256 is not None:
                kind, expected, found = "SHA-256", info.sha256, sha256_of(folder / name, report)
            elif info.blocks_sha256 is not None:
                kind, expected, found = "block hash", info.blocks_sha256, blocks_sha256_of(folder / name, report)
            else:
                continue
        except OSError as error:
            raise BundleError(f"The file {folder / name} cannot be read: {error}.") from error
        if found != expected:
            raise BundleError(
                f"The file {name} of the bundle {bundle.path} has the {kind} {found}{_place(bundle, folder)}, but its "
                f"manifest says {expected}: its content was damaged or changed. {_way_out(bundle, folder)}"
            )
        done += info.bytes
    return tuple(name for _, name, info in listed if info.sha256 is None and info.blocks_sha256 is None)
