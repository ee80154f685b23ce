"""Which of a bundle's engines to run: the one that fits, or the one that was named; whatever the backend."""

from __future__ import annotations

from collections.abc import Callable
from os.path import isdir  # a name that is too long for one is none
from typing import TypeVar

from runtime.bundle import Bundle
from runtime.engine_files import EngineDocument, read_engine_document
from runtime.engine_info import ENGINES_FOLDER
from runtime.errors import BackendError
from runtime.json_files import brief

_Info = TypeVar("_Info")


def choose(
    bundle: Bundle,
    asked: str | None,
    backend: str,
    build: str,
    parse: Callable[[EngineDocument], _Info],
    misfit: Callable[[_Info], str | None],
) -> tuple[EngineDocument, _Info]:
    """The engine of `bundle` that the backend of this name runs here, and what `parse` makes of its engine.json.

    asked: its name, or None for the only one that fits. build: the command that makes one. parse: is called for this
    backend's engines only. misfit: why one of these does not run here, as the end of a sentence about it; None if it
    does.

    Raises BackendError when none fits or several do, naming each engine and why it does not fit, and BundleError for
    an engine that is damaged.
    """
    engines = bundle.manifest.engines
    if not engines:
        raise BackendError(
            f"No engine was built of the bundle {bundle.path} yet, and the backend {backend} runs nothing else. Make "
            f"one with {build}."
        )
    if asked is not None and asked not in engines:
        raise BackendError(
            f"The bundle {bundle.path} has no engine {brief(asked)}. It has {', '.join(sorted(engines))}. Name one of "
            f"these, or build another with {build}."
        )
    reasons: dict[str, str] = {}
    fitting: list[tuple[EngineDocument, _Info]] = []
    for name in sorted(engines) if asked is None else [asked]:
        if asked is None and not isdir(bundle.path / ENGINES_FOLDER / name):
            reasons[name] = "was deleted"
            continue
        document = read_engine_document(bundle, name)
        if document.backend != backend:
            reasons[name] = f"is for the backend {brief(document.backend)}"
            continue
        info = parse(document)
        if (reason := misfit(info)) is None:
            fitting.append((document, info))
        else:
            reasons[name] = reason
    if not fitting:
        said = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise BackendError(
            f"No engine of the bundle {bundle.path} runs here: {said}. Build one that does with {build}, or load the "
            "bundle with another backend."
        )
    if len(fitting) > 1:
        raise BackendError(
            f"Several engines of the bundle {bundle.path} run here: {', '.join(d.name for d, _ in fitting)}. Name "
            "one of them with --engine (engine= of `load`)."
        )
    return fitting[0]


def misfit_of_bundle(bundle: Bundle, graph_sha256: str, chunk: int, max_batch: int) -> str | None:
    """Why an engine of that graph, for that many tokens and rows, does not run this bundle; None if it does."""
    manifest = bundle.manifest
    if graph_sha256 != manifest.files[manifest.graph.file].sha256:
        return f"was built of another {manifest.graph.file}: the bundle was exported again since"
    if chunk < manifest.kv.chunk or max_batch < manifest.kv.max_batch:
        return (
            f"takes {max_batch} rows of {chunk} tokens at most, and the bundle has {manifest.kv.max_batch} "
            f"of {manifest.kv.chunk}"
        )
    return None
