"""What `cierzo inspect` says of a bundle's engines: those that were built, and one that could be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from exporter.inspect_report import EngineFacts, LoweredFacts
from runtime.errors import BundleError
from runtime.json_files import brief

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.engine_files import EngineDocument


def lowered_facts(bundle: Bundle, backend: str, arithmetic: str | None) -> LoweredFacts:
    """An engine of `bundle` that was not built; see `exporter.build.build.place_nodes`, and there for errors."""
    from exporter.build.build import place_nodes

    computes, nodes = place_nodes(bundle, backend, arithmetic)
    return LoweredFacts(backend, computes, nodes)


def engine_facts(bundle: Bundle, name: str) -> EngineFacts:
    """The engine `name` of `bundle`, or what is wrong with it."""
    from runtime.engine_files import read_engine_document

    try:
        document = read_engine_document(bundle, name)
        read = _ENGINES.get(document.backend)
        if read is None:
            raise BundleError(f"The engine {name} is for {brief(document.backend)}, which this Cierzo does not know.")
        return read(document)
    except BundleError as error:
        return EngineFacts(name, problem=str(error))


def _plans(document: EngineDocument) -> EngineFacts:
    from runtime.engine_info import parse_engine

    info = parse_engine(document.name, document.content)
    return EngineFacts(
        name=info.name,
        backend=info.backend,
        flavor=info.flavor,
        version=info.version,
        compute_capability=info.compute_capability,
        arithmetic=info.arithmetic,
        kv=info.kv,
        plugins=info.plugins,
        weights=info.weights,
        bytes=sum(plan.bytes for plan in info.plans.values()),
    )


def _graphs(document: EngineDocument) -> EngineFacts:
    from runtime.step_engine_info import parse_step_engine

    info = parse_step_engine(document.name, document.root)
    return EngineFacts(
        name=info.name,
        backend=info.backend,
        version=info.version,
        arithmetic=info.arithmetic,
        kv=info.kv,
        bytes=sum(graph.bytes for graph in info.graphs.values()),
        nodes={name: graph.placement for name, graph in info.graphs.items()},
    )


_ENGINES: Mapping[str, Callable[[EngineDocument], EngineFacts]] = {
    "tensorrt": _plans,
    "onnxruntime-cuda": _graphs,
}
"""Backend -> what its engines say of themselves."""
