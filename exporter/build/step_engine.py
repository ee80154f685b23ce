"""Engines of ONNX graphs for ONNX Runtime's CUDA provider: lowered, placed and written. No GPU, nothing is compiled.

Letters: B batch rows, T tokens of a step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from exporter.build.cuda_placement import placement
from exporter.build.cuda_provider import VERSION
from exporter.build.engine_folder import engine_folder
from exporter.build.kinds import EngineKind, Placements, Progress
from exporter.build.options import default_arithmetic
from exporter.build.step_graphs import StepGraphs, lower_for_steps
from exporter.build.top_logits import top_logits_model
from exporter.defaults import LOWERING
from exporter.hashing import own_entry
from runtime.bundle import Bundle
from runtime.engine_info import DECODE, ENGINE_FILE, ENGINES_FOLDER, PREFILL
from runtime.errors import BackendError
from runtime.step_engine_info import BOUNDS, GRAPHS, TOP, GraphFile, StepEngineInfo, step_engine_to_json

if TYPE_CHECKING:
    from rich.table import Table

ARITHMETIC = ("bfloat16", "float16")
"""Types that ONNX Runtime's attention kernels on CUDA compute in."""

_MOST_NUMBERS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LoweredEngine:
    """An engine before it is written. models: the ONNX file of each of GRAPHS. placements: their nodes."""

    arithmetic: str
    graphs: StepGraphs
    models: Mapping[str, bytes]
    placements: Placements


@dataclass(frozen=True, slots=True)
class BuiltSteps:
    """What a build made."""

    folder: Path
    info: StepEngineInfo

    def to_json(self) -> dict[str, Any]:
        """What `cierzo build --json` prints."""
        from exporter.build.step_tables import to_json

        return to_json(self)

    def draw(self) -> Table:
        """What a step runs, by place."""
        from exporter.build.step_tables import draw

        return draw(self)

    def written(self) -> str:
        """What lies in the folder, for a person."""
        from exporter.build.step_tables import written

        return written(self)


def lower_engine(bundle: Bundle, arithmetic: str | None = None, progress: Progress | None = None) -> LoweredEngine:
    """The graphs of an engine of `bundle` that computes in `arithmetic` (of ARITHMETIC; by default as the weights).

    progress: called with (stage, done, total). Raises BackendError for another arithmetic, for nodes that would not run
    on the GPU, and as `lower_for_steps` does.
    """
    computes = _arithmetic(bundle, arithmetic)

    def report(done: int) -> None:
        if progress is not None:
            progress(LOWERING, done, len(GRAPHS))

    report(0)
    graphs = lower_for_steps(bundle, computes)
    _refuse_what_is_not_counted(bundle, graphs)
    top = top_logits_model(bundle.manifest.model.vocab_size).SerializeToString(deterministic=True)
    models = {PREFILL: graphs.prefill, DECODE: graphs.decode, TOP: top}
    placements = {}
    for done, name in enumerate(GRAPHS):
        placements[name] = placement(onnx.load_from_string(models[name]), host=(BOUNDS,))
        report(done + 1)
    return LoweredEngine(computes, graphs, models, placements)


def build_steps(
    opened: Bundle, *, backend: str, progress: Progress | None, arithmetic: str | None = None
) -> BuiltSteps:
    """Build an engine of graphs; see `exporter.build.build.build`."""
    lowered = lower_engine(opened, arithmetic, progress)
    name = _name(opened, backend, lowered.arithmetic)
    with engine_folder(opened, name) as folder:
        for graph, content in lowered.models.items():
            (folder / f"{graph}.onnx").write_bytes(content)
        info = _info(opened, name, backend, lowered, folder)
        (folder / ENGINE_FILE).write_text(json.dumps(step_engine_to_json(info), indent=1) + "\n", encoding="utf-8")
    return BuiltSteps(opened.path / ENGINES_FOLDER / name, info)


def _arithmetic(bundle: Bundle, asked: str | None) -> str:
    computes = default_arithmetic(bundle) if asked is None else asked
    if computes in ARITHMETIC:
        return computes
    why = "asked for" if asked is not None else f"that of most weights of {bundle.path}"
    raise BackendError(
        f"Engines of this backend compute in {' or '.join(ARITHMETIC)}, in which ONNX Runtime attends on GPUs, and "
        f"{computes} is {why}. Say which of them with --arithmetic (arithmetic=...)."
    )


def _refuse_what_is_not_counted(bundle: Bundle, graphs: StepGraphs) -> None:
    """Kernels that gather and scatter count what they move in 32 bits."""
    manifest = bundle.manifest
    scratch = 0 if graphs.scratch is None else graphs.scratch.slots
    slots = max(scratch, *(ring.slots for ring in graphs.rings))
    numbers = manifest.kv.max_batch * slots * manifest.model.num_kv_heads * manifest.model.head_dim
    if numbers > _MOST_NUMBERS:
        raise BackendError(
            f"The KV buffer of a layer has {slots:,} slots and {numbers:,} numbers for {manifest.kv.max_batch} rows, "
            f"and ONNX Runtime's kernels count up to {_MOST_NUMBERS:,} of them. Export the checkpoint with a smaller "
            "--max-batch (max_batch=...) or --context (context=...)."
        )


def _name(bundle: Bundle, backend: str, arithmetic: str) -> str:
    """The folder's name: what tells engines apart for a person, and a hash of all that tells them apart."""
    told = {"backend": backend, "version": VERSION, "arithmetic": arithmetic, "graph": _graph_sha256(bundle)}
    told |= {"chunk": str(bundle.manifest.kv.chunk), "max_batch": str(bundle.manifest.kv.max_batch)}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return f"onnxruntime-{VERSION}-{arithmetic}-{digest[:8]}"


def _graph_sha256(bundle: Bundle) -> str:
    digest = bundle.manifest.files[bundle.manifest.graph.file].sha256
    assert digest is not None  # the manifest's own rule for the bundle's files
    return digest


def _info(bundle: Bundle, name: str, backend: str, lowered: LoweredEngine, folder: Path) -> StepEngineInfo:
    files = {}
    for graph in lowered.models:
        entry = own_entry(folder / f"{graph}.onnx")
        files[graph] = GraphFile(f"{graph}.onnx", entry["bytes"], entry["sha256"], lowered.placements[graph])
    return StepEngineInfo(
        name=name,
        backend=backend,
        version=VERSION,
        arithmetic=lowered.arithmetic,
        kv=lowered.arithmetic,
        max_batch=bundle.manifest.kv.max_batch,
        chunk=bundle.manifest.kv.chunk,
        graph_sha256=_graph_sha256(bundle),
        graphs=files,
        rings=lowered.graphs.rings,
        scratch=lowered.graphs.scratch,
        tensors=lowered.graphs.weights,
        orders=lowered.graphs.orders,
    )


def _place(bundle: Bundle, arithmetic: str | None) -> tuple[str, Placements]:
    lowered = lower_engine(bundle, arithmetic)
    return lowered.arithmetic, lowered.placements


KIND = EngineKind(options=("arithmetic",), build=build_steps, place=_place)
