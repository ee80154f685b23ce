"""The files of a bundle's built engines, whatever backend they are for: found, held to their hashes, told apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import Bundle
from runtime.engine_info import ENGINE, ENGINE_FILE, ENGINES_FOLDER, parse_name
from runtime.errors import BundleError
from runtime.hashing import sha256_of
from runtime.json_files import MOST_BYTES, open_regular_file, parse_json_object
from runtime.manifest_section import Section

_BUILD_AGAIN = "Delete the engine's folder and build it again with `cierzo build`."


@dataclass(frozen=True, slots=True)
class EngineDocument:
    """An engine.json as the bundle's manifest describes it: its folder, its bytes, and the JSON object that they spell.

    What its keys mean depends on the backend: `engine_info.parse_engine`, `step_engine_info.parse_step_engine`.
    """

    name: str
    folder: Path
    content: bytes
    root: Section

    @property
    def backend(self) -> str:
        """The backend that it was built for. Raises BundleError where it does not say."""
        return parse_name(self.root, "backend")


def read_engine_document(bundle: Bundle, name: str) -> EngineDocument:
    """What the bundle's engine `name` says of itself. Raises BundleError for one that is damaged or gone."""
    expected = bundle.manifest.engines[name]
    folder = bundle.path / ENGINES_FOLDER / name
    path = folder / ENGINE_FILE
    try:
        with open_regular_file(path) as stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise BundleError(
            f"The engine {name} of the bundle {bundle.path} cannot be read: {error}. {_BUILD_AGAIN}"
        ) from error
    if len(content) != expected.bytes or hashlib.sha256(content).hexdigest() != expected.sha256:
        raise BundleError(
            f"{path} is not what the bundle's manifest says it is: it was damaged or changed. {_BUILD_AGAIN}"
        )
    return EngineDocument(name, folder, content, engine_section(name, content))


def engine_section(name: str, content: bytes) -> Section:
    """The JSON object of an engine.json. Raises BundleError for anything else."""
    data = parse_json_object(
        content,
        lambda cause: BundleError(f"The engine {name} is not described by readable JSON ({cause}). Build it again."),
    )
    return Section(data, f"engine {name}: ", ENGINE)


def checked_file(folder: Path, file: str, nbytes: int, sha256: str, what: str) -> Path:
    """A file of an engine, such as its plan or graph (`what`, for messages), in its folder.

    Raises BundleError when its size or its hash is not what engine.json says.
    """
    path = folder / file
    try:
        size = path.stat().st_size
        found = sha256_of(path) if size == nbytes else None
    except OSError as error:
        raise BundleError(f"The {what} {path} cannot be read: {error}. {_BUILD_AGAIN}") from error
    if found != sha256:
        differs = f"{size} bytes and not {nbytes}" if found is None else "another content"
        raise BundleError(f"The {what} {path} has {differs}: it was damaged or changed. {_BUILD_AGAIN}")
    return path
