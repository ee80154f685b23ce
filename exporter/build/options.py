"""What an engine is built as: what was asked for, what is taken otherwise, and what cannot be."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from exporter.defaults import ARITHMETIC_KINDS, ENGINE_BACKENDS, ENGINE_WEIGHTS, RING_KINDS
from runtime.bundle import Bundle
from runtime.errors import BackendError
from runtime.tensorrt.cuda_device import open_device
from runtime.tensorrt.flavor import FLAVORS, FLAVORS_FOR_OTHER_GPUS, Flavor, load_flavor, supported_gpus
from runtime.tensorrt_plugins import OPERATIONS, planned_device

ALL, NONE = "all", "none"
_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
_SPELLED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_WIDTH = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """An engine's options, complete and compatible. compute_capability: as "8.9". plugins: names of ops, sorted."""

    backend: str
    flavor: str
    version: str
    compute_capability: str
    arithmetic: str
    kv: str
    plugins: tuple[str, ...]
    weights: str

    def name(self, bundle: Bundle) -> str:
        """The folder's name: what tells engines apart for a person, and a hash of all that tells them apart."""
        manifest = bundle.manifest
        graph = manifest.files[manifest.graph.file].sha256
        told = {**asdict(self), "graph": graph, "chunk": manifest.kv.chunk, "max_batch": manifest.kv.max_batch}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        capability = self.compute_capability.replace(".", "")
        return f"{self.flavor}-{self.version}-sm{capability}-{self.arithmetic}-{digest[:8]}"


def resolve_options(
    bundle: Bundle,
    *,
    backend: str = ENGINE_BACKENDS[0],
    flavor: str | None = None,
    compute_capability: str | None = None,
    arithmetic: str | None = None,
    kv: str | None = None,
    plugins: str | Collection[str] | None = None,
    weights: str = ENGINE_WEIGHTS[0],
) -> tuple[Flavor, BuildOptions]:
    """The loaded flavour and all options for building an engine of `bundle`; see `exporter.build.build.build`.

    Raises BackendError for whatever is unknown, not installed, or does not go together.
    """
    _one_of("backend that engines are built for", backend, ENGINE_BACKENDS)
    _one_of("flavour", flavor, FLAVORS)
    _one_of("arithmetic", arithmetic, ARITHMETIC_KINDS)
    _one_of("type of KV rings", kv, RING_KINDS)
    _one_of("kind of engine weights", weights, ENGINE_WEIGHTS)
    computes = arithmetic if arithmetic is not None else default_arithmetic(bundle)
    chosen = _plugins(plugins, computes)
    rings = computes if kv is None else kv
    if rings not in ARITHMETIC_KINDS and not _attention().issubset(chosen):
        raise BackendError(
            f"KV rings of {rings} are read and written by plugins only, and {' and '.join(sorted(_attention()))} are "
            "not both among those asked for. Build with --plugins all, or with another --kv."
        )
    loaded = load_flavor(flavor)
    target = _target(loaded, compute_capability)
    if chosen:
        planned_device(target)  # refuses what no kernel is made for
    return loaded, BuildOptions(
        backend=backend,
        flavor=loaded.name,
        version=loaded.version,
        compute_capability=target,
        arithmetic=computes,
        kv=rings,
        plugins=chosen,
        weights=weights,
    )


def default_arithmetic(bundle: Bundle) -> str:
    """The type that most of the bundle's tensors are stored in, or that of the scales where weights are quantised."""
    weights = bundle.manifest.weights
    if weights.quantization is not None:
        return weights.quantization.scales
    counts = {_SPELLED[dtype]: count for dtype, count in weights.types.items() if dtype in _SPELLED}
    if not counts:
        raise BackendError(
            f"The bundle {bundle.path} stores its weights as {', '.join(weights.types)}, which says nothing of the "
            f"type to compute in. Name one with --arithmetic: {', '.join(ARITHMETIC_KINDS)}."
        )
    return max(counts, key=lambda kind: (counts[kind], _WIDTH.index(kind)))


def _attention() -> frozenset[str]:
    """The plugins that read and write rings."""
    return frozenset(name for name, operation in OPERATIONS.items() if "ring" in operation.signature.choices)


def require_nodes(
    bundle: Bundle, asked: str | Collection[str] | None, chosen: Collection[str], found: Collection[str]
) -> None:
    """Raises BackendError for plugins that were asked for by name and have no node to run in the graph."""
    missing = [name for name in chosen if name not in found]
    if not _attention().isdisjoint(found):
        missing = [name for name in missing if name not in _attention()]
    if missing and asked not in (None, ALL):
        raise BackendError(
            f"The graph of {bundle.path} has no node for the plugin {missing[0]}. Build with --plugins all, which "
            "takes those that it has nodes for."
        )


def _one_of(what: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise BackendError(f"There is no {what} {value!r}. Available: {', '.join(known)}.")


def _plugins(asked: str | Collection[str] | None, arithmetic: str) -> tuple[str, ...]:
    """Names of ops; unless something else is asked for, all that compute in `arithmetic`."""
    narrow = arithmetic != "float32"
    if asked is None or asked == ALL:
        names = tuple(sorted(OPERATIONS)) if narrow or asked == ALL else ()
    elif isinstance(asked, str):
        names = () if asked == NONE else tuple(sorted({name for name in asked.split(",") if name}))
    else:
        names = tuple(sorted(set(asked)))
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise BackendError(
            f"There is no plugin {unknown[0]!r}. Available: {', '.join(sorted(OPERATIONS))}; or {ALL}, or {NONE}."
        )
    # One graph may have nodes of all of them, and rings are either written in place throughout or not at all.
    if not _attention().isdisjoint(names):
        names = tuple(sorted({*names, *_attention()}))
    if names and not narrow:
        raise BackendError(
            f"Cierzo's TensorRT plugins compute in bfloat16 or float16, not in {arithmetic}. Build with --arithmetic "
            "bfloat16 (arithmetic='bfloat16') or float16, or without plugins: --plugins none."
        )
    return names


def _target(flavor: Flavor, asked: str | None) -> str:
    """The compute capability to build for."""
    if asked is not None and not _CAPABILITY.fullmatch(asked):
        raise BackendError(f"{asked!r} is no compute capability. It is spelled like 8.9; NVIDIA lists it for each GPU.")
    if flavor.builds_for is None:
        return _of_the_gpu(flavor, *_gpu(), asked)
    target = asked if asked is not None else _gpu()[0]
    if target is None:
        raise BackendError(
            "There is no GPU here to build for, so say for which one: --compute-capability, one of "
            f"{', '.join(flavor.builds_for)} (8.6 is an RTX 3090, 8.9 an RTX 4090 or L40S, 12.0 an RTX 5090)."
        )
    if target in flavor.builds_for:
        return target
    others = [name for name in FLAVORS if name != flavor.name and target in supported_gpus(name)]
    way_out = (
        f"Build on a machine with that GPU, with --flavor {others[0]}." if others else "No other flavour does either."
    )
    raise BackendError(
        f"{flavor.name} {flavor.version} does not build for compute capability {target}, only for "
        f"{', '.join(flavor.builds_for)}. {way_out}"
    )


def _of_the_gpu(flavor: Flavor, here: str | None, reason: str, asked: str | None) -> str:
    """For a flavour that builds for the GPU at hand only: its compute capability, which must be the one asked for."""
    way_out = f"Build on a machine with the GPU that is meant, or with --flavor {' or '.join(FLAVORS_FOR_OTHER_GPUS)}."
    if here is None:
        raise BackendError(
            f"{flavor.name} builds engines on the GPU that is to run them, and there is none here: {reason} {way_out}"
        )
    if asked not in (None, here):
        raise BackendError(
            f"{flavor.name} builds for the GPU at hand only, which has compute capability {here}, not {asked}. "
            f"{way_out}"
        )
    return here


def _gpu() -> tuple[str | None, str]:
    """The compute capability of the first GPU, or None and why."""
    try:
        return open_device().compute_capability, ""
    except BackendError as error:
        return None, str(error)
