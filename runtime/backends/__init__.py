"""The table of backends. A backend's module, and the library behind it, are imported only when it is chosen."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from runtime.backends.base import Backend, Capabilities, Engine
from runtime.bundle import Bundle, Progress
from runtime.errors import BackendError
from runtime.json_files import brief

BACKENDS: dict[str, str] = {
    "onnxruntime": "runtime.backends.onnxruntime",
    "tensorrt": "runtime.backends.tensorrt",
    "onnxruntime-cuda": "runtime.backends.onnxruntime_cuda",
}
"""Name -> module. The first one is the default."""

DEFAULT_BACKEND = next(iter(BACKENDS))


def open_engine(
    bundle: Bundle,
    *,
    backend: str | None,
    device: str | None,
    threads: int | None,
    profile: Path | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Open `bundle` with the backend and device named (None: the default one, the backend's first device).

    profile: a folder, where the backend keeps a profile of all steps until `Engine.end_profile`.
    engine: the name of one of the bundle's engines, for backends that run those; None takes the one that fits.
    progress: called with (stage, done, total) where loading takes long.

    Raises BackendError, naming what is available, for an unknown backend or device, for a backend whose library is
    not installed, for a backend that runs no engines when one is named, and for a bundle that the backend cannot run
    exactly.
    """
    name, module = _module(backend)
    if threads is not None and (type(threads) is not int or threads < 1):
        raise BackendError(f"`threads` must be a positive integer or None (one per physical core), not {threads!r}.")
    if threads is not None and not module.CAPABILITIES.threads:
        raise BackendError(f"The backend {name} runs on the GPU, so it has no use for `threads`. Leave it out.")
    chosen = _supported_device(module.CAPABILITIES, bundle, device)
    if engine is not None and not module.CAPABILITIES.engines:
        raise BackendError(
            f"The backend {name} runs a bundle's graph as it is, not an engine that was built of it such as "
            f"{brief(engine)}. Leave `engine` out, or name the backend that the engine was built for."
        )
    return module.open_engine(bundle, device=chosen, threads=threads, profile=profile, engine=engine, progress=progress)


def chooses_threads(backend: str | None) -> bool:
    """Whether the number of threads of a backend (None: the default one) can be chosen."""
    return _module(backend)[1].CAPABILITIES.threads


def _module(backend: str | None) -> tuple[str, Backend]:
    name = DEFAULT_BACKEND if backend is None else backend
    if name not in BACKENDS:
        raise BackendError(f"There is no backend {name!r}. Available: {', '.join(BACKENDS)}.")
    try:
        return name, cast(Backend, importlib.import_module(BACKENDS[name]))
    except ImportError as error:
        raise BackendError(f"The backend {name} cannot be used, install what it needs: {error}.") from error


def _supported_device(capabilities: Capabilities, bundle: Bundle, device: str | None) -> str:
    chosen = capabilities.devices[0] if device is None else device
    if chosen not in capabilities.devices:
        raise BackendError(
            f"The backend {capabilities.name} has no device {chosen!r}. Available: {', '.join(capabilities.devices)}."
        )
    manifest = bundle.manifest
    for what, needed, supported in (
        ("KV buffers", [manifest.kv.dtype], capabilities.kv_dtypes),
        ("weights", manifest.weights.types, capabilities.storage_types),
        ("arithmetic", [manifest.weights.arithmetic], capabilities.arithmetic),
    ):
        missing = [dtype for dtype in needed if dtype not in supported]
        if missing:
            raise BackendError(
                f"The bundle {bundle.path} has {brief(missing[0])[1:-1]} {what}, but the backend {capabilities.name} "
                f"runs only {', '.join(supported)}. Export the checkpoint again with one of these, or choose another "
                "backend."
            )
    return chosen
