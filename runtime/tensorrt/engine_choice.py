"""Which of a bundle's engines to run: exactly one must be made for this library, this GPU and this graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import Bundle
from runtime.engine_choice import choose, misfit_of_bundle
from runtime.engine_files import checked_file, read_engine_document
from runtime.engine_info import EngineInfo, PlanInfo, parse_engine
from runtime.errors import BackendError
from runtime.json_files import brief
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
        return checked_file(self.folder, plan.file, plan.bytes, plan.sha256, "plan")


def choose_engine(
    bundle: Bundle, asked: str | None, compute_capability: str, backend: str, *, load: Loader = load_flavor
) -> BuiltEngine:
    """The engine of `bundle` that runs here.

    asked: its name, or None for the only one that fits. compute_capability: the GPU's, such as "8.9". backend: the
    name of the backend that asks. load: imports a flavour.

    Raises BackendError when none fits or several do, naming each engine and why it does not fit, and BundleError for
    an engine that is damaged.
    """
    build = f"`cierzo build {bundle.path} --backend {backend} --compute-capability {compute_capability}`"
    flavors = _Flavors(load)
    document, info = choose(
        bundle,
        asked,
        backend,
        build,
        lambda document: parse_engine(document.name, document.content),
        lambda info: _misfit(bundle, info, compute_capability, flavors),
    )
    return BuiltEngine(document.folder, info, flavors.loaded(info.flavor))


def read_engine(bundle: Bundle, name: str) -> EngineInfo:
    """What the bundle's engine `name` says of itself. Raises BundleError for one that is damaged or gone."""
    return parse_engine(name, read_engine_document(bundle, name).content)


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


def _misfit(bundle: Bundle, info: EngineInfo, compute_capability: str, flavors: _Flavors) -> str | None:
    """Why an engine does not run here, as the end of a sentence about it; None if it does."""
    if reason := misfit_of_bundle(bundle, info.graph_sha256, info.chunk, info.max_batch):
        return reason
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
