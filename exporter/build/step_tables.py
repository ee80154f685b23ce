"""What a build of graphs shows: their nodes by where they run, and a JSON object."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from exporter.build.weights_as_inputs import filled_from
from exporter.node_table import draw_nodes
from runtime.step_engine_info import CONSTANT

if TYPE_CHECKING:
    from rich.table import Table

    from exporter.build.step_engine import BuiltSteps

_BITS = {"F32": 32, "F16": 16, "BF16": 16, "U8": 8, "I8": 8}


def to_json(built: BuiltSteps) -> dict[str, Any]:
    """What `--json` prints."""
    info = built.info
    return {
        "engine": info.name,
        "folder": str(built.folder),
        **{key: getattr(info, key) for key in ("backend", "version", "arithmetic", "kv", "chunk", "max_batch")},
        "graphs": {
            name: {
                "bytes": graph.bytes,
                "nodes": {place: dict(counts) for place, counts in graph.placement.items()},
            }
            for name, graph in info.graphs.items()
        },
        "weights": {
            "inputs": sum(weight.role != CONSTANT for weight in info.tensors),
            "constants": sum(weight.role == CONSTANT for weight in info.tensors),
            "bytes": _weight_bytes(built),
        },
    }


def draw(built: BuiltSteps) -> Table:
    """How many nodes of each op each graph has, and where they run."""
    info = built.info
    title = f"ONNX Runtime {info.version}, {info.arithmetic}"
    return draw_nodes(title, {name: graph.placement for name, graph in info.graphs.items()})


def written(built: BuiltSteps) -> str:
    """How large the graphs are, and where their weights come from."""
    size = sum(graph.bytes for graph in built.info.graphs.values())
    filled = filled_from(built.info.tensors)
    return f"{size / 1e6:,.1f} MB; {_weight_bytes(built) / 1e6:,.1f} MB of weights, {filled}"


def _weight_bytes(built: BuiltSteps) -> int:
    """What weights take on the GPU."""
    return sum(math.prod(weight.shape) * _BITS[weight.dtype] // 8 for weight in built.info.tensors)
