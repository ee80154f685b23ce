"""Which of a bundle's engines to run: exactly one must be made for this library, this GPU and this graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from os.path import isdir  # a name that is too long for one is none
from pathlib import Path

from runtime.bundle import Bundle
from runtime.engine_info import ENGINE_FILE, ENGINES_FOLDER, EngineInfo, PlanInfo, parse_engine
from runtime.errors import BackendError, BundleError
from runtime.hashing import sha256_of
from runtime.json_files import MOST_BYTES, brief, open_regular_file
from runtime.tensorrt.flavor import FLAVORS, Flavor, load_flavor

Loader = Callable[[str | None], Flavor]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine of a bundle: its folder, what its engine.json says, and the library that runs it."""

    folder: Path
    info: EngineInfo
    flavor: Flavor

    def plan_file(self, plan: PlanInfo) -> Path:
        """The plan's file. Raises BundleError when its size or its hash is not what engine.json says."""
        path = self.folder / plan.file
        try:
            size = path.stat().st_size
            found = sha256_of(path) if size == plan.bytes else None
        except OSError as error:
            raise BundleError(f"The plan {path} cannot be read: {error}. {_BUILD_AGAIN}") from error
        if found != plan.sha256:
            differs = f"{size} bytes and not {plan.bytes}" if found is None else "another content"
            raise BundleError(f"The plan {path} has {differs}: it was damaged or changed. {_BUILD_AGAIN}")
        return path


_BUILD_AGAIN = "Delete the engine's folder and build it again with `cierzo build`."


def choose_engine(
    bundle: Bundle, asked: str | None, compute_capability: str, backend: str, *, load: Loader = load_flavor
) -> BuiltEngine:
    """The engine of `bundle` that runs here.

    asked: its name, or None for the only one that fits. compute_capability: the GPU's, such as "8.9". backend: the
    name of the backend that asks. load: imports a flavour.

    Raises BackendError when none fits or several do, naming each engine and why it does not fit, and BundleError for
    an engine that is damaged.
    """
    engines = bundle.manifest.engines
    build = f"`cierzo build {bundle.path} --backend {backend} --compute-capability {compute_capability}`"
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
    names = sorted(engines) if asked is None else [asked]
    deleted = [name for name in names if asked is None and not isdir(bundle.path / ENGINES_FOLDER / name)]
    found = [read_engine(bundle, name) for name in names if name not in deleted]
    flavors = _Flavors(load)
    reasons: dict[str, str | None] = dict.fromkeys(deleted, "was deleted")
    reasons |= {info.name: _misfit(bundle, info, compute_capability, backend, flavors) for info in found}
    fitting = [info for info in found if reasons[info.name] is None]
    if not fitting:
        said = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise BackendError(
            f"No engine of the bundle {bundle.path} runs here: {said}. Build one that does with {build}, or load the "
            "bundle with another backend."
        )
    if len(fitting) > 1:
        raise BackendError(
            f"Several engines of the bundle {bundle.path} run here: {', '.join(info.name for info in fitting)}. Name "
            "one of them with --engine (engine= of `load`)."
        )
    (info,) = fitting
    return BuiltEngine(bundle.path / ENGINES_FOLDER / info.name, info, flavors.loaded(info.flavor))


def read_engine(bundle: Bundle, name: str) -> EngineInfo:
    """What the bundle's engine `name` says of itself. Raises BundleError for one that is damaged or gone."""
    expected = bundle.manifest.engines[name]
    path = bundle.path / ENGINES_FOLDER / name / ENGINE_FILE
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
    return parse_engine(name, content)


class _Flavors:
    """Imports each flavour once, and remembers why one cannot be."""

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._found: dict[str, Flavor | BackendError] = {}

    def get(self, name: str) -> Flavor | BackendError:
        if name not in self._found:
            try:
                self._found[name] = self._load(name)
            except BackendError as error:
                self._found[name] = error
        return self._found[name]

    def loaded(self, name: str) -> Flavor:
        found = self.get(name)
        assert isinstance(found, Flavor)
        return found


def _misfit(bundle: Bundle, info: EngineInfo, compute_capability: str, backend: str, flavors: _Flavors) -> str | None:
    """Why an engine does not run here, as the end of a sentence about it; None if it does."""
    manifest = bundle.manifest
    if info.backend != backend:
        return f"is for the backend {brief(info.backend)}"
    if info.graph_sha256 != manifest.files[manifest.graph.file].sha256:
        return f"was built of another {manifest.graph.file}: the bundle was exported again since"
    if info.chunk < manifest.kv.chunk or info.max_batch < manifest.kv.max_batch:
        return (
            f"takes {info.max_batch} rows of {info.chunk} tokens at most, and the bundle has {manifest.kv.max_batch} "
            f"of {manifest.kv.chunk}"
        )
    if info.flavor not in FLAVORS:
        return f"is for {brief(info.flavor)}, which this Cierzo does not know"
    flavor = flavors.get(info.flavor)
    if isinstance(flavor, BackendError):
        return f"needs {info.flavor} {info.version} ({str(flavor).rstrip('.')})"
    if info.version != flavor.version:
        return f"is for {info.flavor} {info.version}, and {flavor.version} is installed"
    if info.compute_capability != compute_capability:
        return f"is for GPUs of compute capability {info.compute_capability}, and this one has {compute_capability}"
    if not flavor.runs_on(compute_capability):
        return f"is for {info.flavor}, which does not run on GPUs of compute capability {compute_capability}"
    return None
