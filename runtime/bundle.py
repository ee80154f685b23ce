"""Reading a bundle from disk: a folder with `manifest.json` and the files that it lists.

The manifest is written last, so a folder without one is an export that was killed, and no bundle.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runtime.errors import BundleError
from runtime.manifest import FileInfo, Manifest, parse_manifest

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files were all found with the sizes that its manifest gives; `path` is absolute."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where the file `name` of the manifest lies."""
        return self.path / name


def read_bundle(path: str | os.PathLike[str], *, verify: bool = False) -> Bundle:
    """Read and validate the bundle in the folder `path`.

    `verify=True` also reads every byte and compares the SHA-256 sums (for a 7B model that takes a minute, so it is
    not the default). Raises BundleError for a folder that is missing or has no manifest, for a manifest that
    `parse_manifest` refuses, and for files that are missing, lie outside the folder, or differ in size or sum.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"There is no bundle at {folder}: the folder does not exist. Make one with `cierzo export`.")
    try:
        text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(
            f"The folder {folder} is no bundle: it has no {MANIFEST_NAME}, which an export writes last. If it is a "
            "checkpoint, export it first; if an export was interrupted here, delete the folder and export again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"The manifest {folder / MANIFEST_NAME} cannot be read: {error}.") from error
    manifest = parse_manifest(text)
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected, verify)
    # Absolute, because files such as the tokenizer are read later and the process may change its folder until then.
    return Bundle(path=folder.absolute(), manifest=manifest)


def _check_file(folder: Path, name: str, expected: FileInfo, verify: bool) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or not relative.parts:
        raise BundleError(f"The manifest lists the file {name!r}, which lies outside the bundle. Export again.")
    file = folder / relative
    if not file.is_file():
        raise BundleError(
            f"The bundle {folder} lacks the file {name} that its manifest lists. Copy the bundle again, completely, "
            "or export the checkpoint again."
        )
    size = file.stat().st_size
    if size != expected.bytes:
        raise BundleError(
            f"The file {name} of the bundle {folder} has {size} bytes, but its manifest says {expected.bytes}: it was "
            "truncated or changed. Copy the bundle again, or export the checkpoint again."
        )
    if verify:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != expected.sha256.lower():
            raise BundleError(
                f"The file {name} of the bundle {folder} has the SHA-256 {digest}, but its manifest says "
                f"{expected.sha256}: its content was damaged or changed. Copy the bundle again, or export again."
            )
