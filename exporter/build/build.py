"""From a bundle to an engine: the table of backends that engines are built for, and what is asked for, passed on."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path

from exporter.build.kinds import OPTIONS, Built, EngineKind, Placements, Progress
from exporter.defaults import ENGINE_BACKENDS
from runtime.bundle import Bundle, read_bundle
from runtime.errors import BackendError

KINDS: dict[str, str] = {
    "tensorrt": "exporter.build.plan_engine",
    "onnxruntime-cuda": "exporter.build.step_engine",
}
"""Backend -> module with its `KIND`. The first one is the default."""


def build(
    bundle: str | Path,
    *,
    backend: str = ENGINE_BACKENDS[0],
    flavor: str | None = None,
    compute_capability: str | None = None,
    arithmetic: str | None = None,
    kv: str | None = None,
    plugins: str | Collection[str] | None = None,
    weights: str | None = None,
    weights_folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build an engine of the bundle in the folder `bundle`, into that folder; one built as the same is replaced.

    backend: what runs the engine, a key of KINDS. Those for tensorrt have all of these options, those for
        onnxruntime-cuda have `arithmetic` only, and not float32.
    flavor: a name in `runtime.tensorrt.flavor.FLAVORS`; None takes the first that is installed.
    compute_capability: of the GPU that is to run the engine, as "8.9"; None takes the first GPU here.
    arithmetic: "bfloat16", "float16" or "float32", which linear layers, attention and experts compute in; by default
        the type that the weights are stored in, or of the scales of quantised ones.
    kv: type of the KV rings, one of these or "float8"; by default that of the arithmetic.
    plugins: ops that Cierzo's own kernels run, by name; "none", or "all" (the default where they compute in that type).
    weights: "weightless" plans (the default) are filled from the bundle's files when they are loaded, "embedded" ones
        hold a copy.
    weights_folder: where the checkpoint's files are, if they were moved after the export.
    progress: called with (stage, done, total).

    Raises BundleError for a damaged bundle, and BackendError for options that are unknown or do not go together, a
    library that is missing, and whatever the library does not build.
    """
    kind = _kind(backend)
    values = (flavor, compute_capability, arithmetic, kv, plugins, weights)
    given = {name: value for name, value in zip(OPTIONS, values, strict=True) if value is not None}
    for name in given:
        if name not in kind.options:
            had = " and ".join(f"--{option}" for option in kind.options)
            raise BackendError(
                f"Engines for {backend} have no --{name.replace('_', '-')} ({name}), only {had}. Leave it out, or "
                f"build for {' or '.join(other for other in KINDS if other != backend)} (--backend)."
            )
    opened = read_bundle(bundle, weights_folder=weights_folder)
    return kind.build(opened, backend=backend, progress=progress, **given)


def place_nodes(bundle: Bundle, backend: str, arithmetic: str | None) -> tuple[str, Placements]:
    """In which arithmetic an engine of `bundle` would compute, and where the nodes of its graphs would run.

    backend, arithmetic: as for `build`. Raises BackendError where that cannot be told, and as `build` does.
    """
    place = _kind(backend).place
    if place is None:
        raise BackendError(
            f"What an engine for {backend} runs is decided by the library that builds it. Build one with `cierzo "
            "build`, whose table shows it."
        )
    return place(bundle, arithmetic)


def _kind(backend: str) -> EngineKind:
    if backend not in KINDS:
        raise BackendError(
            f"There is no backend that engines are built for {backend!r}. Available: {', '.join(KINDS)}."
        )
    kind: EngineKind = importlib.import_module(KINDS[backend]).KIND
    return kind
