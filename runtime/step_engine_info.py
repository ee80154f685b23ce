"""What an engine of ONNX graphs says of itself: `engines/NAME/engine.json` of a backend that runs graphs on a GPU.

Two graphs were lowered from the bundle's: one for steps of many tokens and one for steps of a single token. Neither
holds a weight. A third one finds the highest logits. Their KV rings are the engine's own: a windowed layer keeps
exactly its window, since a single token's attention then sees the whole ring and needs no mask, and another layer keeps
the context and a chunk beyond it, where the padding of a step may be written.

Letters: B batch rows, T tokens of a step, G KV heads, D head dim, W window, S slots of a ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from runtime.engine_info import (
    DECODE,
    INPUT,
    PREFILL,
    EngineWeight,
    parse_name,
    parse_orders,
    parse_weight,
    weight_to_json,
)
from runtime.errors import BundleError
from runtime.json_files import brief
from runtime.manifest_section import Section

SCHEMA_VERSION = 1
TOP = "top"
"""A third, tiny graph: it finds the highest logits of each row where they lie. logits float32 [N, V] -> values float32
[N, K], best first, and ids int64 [N, K]. A NaN counts as infinity."""

TOP_LOGITS = 65
"""K of that graph, or V if that is less: one more than are given out, so that the last of those can be seen to be no
tie with others of lower ids."""

GRAPHS = (PREFILL, DECODE, TOP)

CONSTANT = "constant"
"""Role of a weight that the library prepares once when a session is made, and not an input of the graph."""


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph of the engine: its file beside engine.json, size and SHA-256.

    placement: nodes by where they run, as "CUDAExecutionProvider" -> {"Gemm": 64}; function bodies inlined.
    """

    file: str
    bytes: int
    sha256: str
    placement: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class StepRing:
    """KV rings of a layer, [B, S, G·D] each: S is the window where there is one. Names are those of the manifest.

    window: None where the layer sees all positions.
    """

    past_key: str
    past_value: str
    present_key: str
    present_value: str
    slots: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that the windowed layers of the graph for many tokens use in turn: the ring laid out straight.

    slots: of a row, a multiple of PAGE; the shape is [B · slots / PAGE, PAGE, G, D]. keys, values: outputs of the graph
    that must all be bound to one such buffer for keys and one for values.
    """

    slots: int
    keys: tuple[str, ...]
    values: tuple[str, ...]


PAGE = 256
"""Slots of a page of the scratch memory. FlashAttention reads pages of 256 at every head dim."""

BOUNDS = "attention_bounds"
"""Input int32 [2] in the host's memory, of the graph for many tokens where a layer has a window: the most new tokens of
a row, and the most keys of one in the scratch memory, min(start, W − 1) + T."""


@dataclass(frozen=True, slots=True)
class StepEngineInfo:
    """A whole engine.json. version: of the library whose kernels the placement was worked out for.

    arithmetic, kv: types, as "bfloat16". graph_sha256: of the bundle's ONNX file. graphs: PREFILL, DECODE and TOP.
    tensors: of the roles INPUT and CONSTANT.
    """

    name: str
    backend: str
    version: str
    arithmetic: str
    kv: str
    max_batch: int
    chunk: int
    graph_sha256: str
    graphs: Mapping[str, GraphFile]
    rings: tuple[StepRing, ...]
    scratch: Scratch | None
    tensors: tuple[EngineWeight, ...]
    orders: Mapping[str, tuple[int, ...]]


def parse_step_engine(name: str, root: Section) -> StepEngineInfo:
    """Parse an engine.json. Raises BundleError for whatever is damaged, missing or of a newer schema."""
    version = root.integer("schema_version", minimum=1)
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"The engine {name} was written with schema {version}, but this Cierzo reads schema {SCHEMA_VERSION}. "
            "Build it again with `cierzo build`."
        )
    orders = parse_orders(name, root.section("orders"))
    graphs = root.section("graphs")
    return StepEngineInfo(
        name=name,
        **{key: parse_name(root, key) for key in ("backend", "version", "arithmetic", "kv")},
        max_batch=root.integer("max_batch", minimum=1),
        chunk=root.integer("chunk", minimum=1),
        graph_sha256=root.hash("graph_sha256"),
        graphs=MappingProxyType({key: _graph(graphs.section(key)) for key in GRAPHS}),
        rings=tuple(_ring(ring) for ring in root.sections("rings")),
        scratch=_scratch(root.section("scratch")) if root.data.get("scratch") is not None else None,
        tensors=tuple(parse_weight(tensor, orders, (INPUT, CONSTANT)) for tensor in root.sections("tensors")),
        orders=orders,
    )


def step_engine_to_json(engine: StepEngineInfo) -> dict[str, Any]:
    """The document that `parse_step_engine` reads back to the same StepEngineInfo."""
    return {
        "schema_version": SCHEMA_VERSION,
        **{
            key: getattr(engine, key)
            for key in ("backend", "version", "arithmetic", "kv", "max_batch", "chunk", "graph_sha256")
        },
        "graphs": {
            key: {
                "file": graph.file,
                "bytes": graph.bytes,
                "sha256": graph.sha256,
                "placement": {place: dict(nodes) for place, nodes in graph.placement.items()},
            }
            for key, graph in engine.graphs.items()
        },
        "rings": [{key: getattr(ring, key) for key in StepRing.__slots__} for ring in engine.rings],
        "scratch": None
        if engine.scratch is None
        else {
            "slots": engine.scratch.slots,
            "keys": list(engine.scratch.keys),
            "values": list(engine.scratch.values),
        },
        "orders": {key: list(order) for key, order in engine.orders.items()},
        "tensors": [weight_to_json(tensor) for tensor in engine.tensors],
    }


def _graph(section: Section) -> GraphFile:
    file = parse_name(section, "file")
    if "/" in file or "\\" in file or file in ("", ".", ".."):
        raise BundleError(
            f"The graph {file!r} of {section.path[:-1]} lies outside the engine's folder. Build it again."
        )
    placement = section.section("placement")
    nodes = {}
    for place in placement.data:
        counts = placement.section(place)
        nodes[place] = {op: counts.integer(op, minimum=1) for op in counts.data}
    return GraphFile(file, section.integer("bytes", minimum=1), section.hash("sha256"), nodes)


def _ring(section: Section) -> StepRing:
    window = section.data.get("window")
    slots = section.integer("slots", minimum=1)
    if window is not None and (type(window) is not int or window != slots):
        raise BundleError(
            f"{section.path[:-1]} holds {slots} slots for the window {brief(window)}, and a ring of a window has as "
            "many as that. Build the engine again."
        )
    names = {key: parse_name(section, key) for key in ("past_key", "past_value", "present_key", "present_value")}
    return StepRing(**names, slots=slots, window=window)


def _scratch(section: Section) -> Scratch:
    slots = section.integer("slots", minimum=1)
    if slots % PAGE:
        raise BundleError(f"{section.path}slots is {slots}, which is no multiple of {PAGE}. Build the engine again.")
    return Scratch(slots, tuple(section.strings("keys")), tuple(section.strings("values")))
