"""Writes the files of a bundle into its folder: graph, weights or links to them, tokenizer, and the manifest last."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from exporter.defaults import QUANTIZED_KINDS
from exporter.describe import (
    graph_section,
    kv_section,
    model_section,
    provenance_section,
    version,
    weights_section,
)
from exporter.frontends import Frontend
from exporter.hashing import large_entries, large_entry, own_entry
from exporter.placement import IN_THE_BUNDLE, Placement, place
from exporter.plan import ExportPlan
from exporter.quantize.decide import decide, is_quantized
from exporter.quantize.file import QuantizedFile, plan_quantized_file, write_quantized_file
from exporter.quantize.options import QuantizeOptions
from exporter.recipe import Recipe, with_equal_experts
from exporter.recipes import bind_weights, referenced, stored_formats
from exporter.save import MANIFEST_FILE, write_manifest
from exporter.unchanged import State, require_unchanged
from exporter.weights import WEIGHTS_FILE, WeightsFile, plan_file, write_weights
from graph_passes.lower.formats import TYPES, LinearFormat, Quantized
from graph_passes.lower.kv import lower_kv
from graph_passes.lower.linears import lower_linears
from graph_passes.lower.rounding import allow_rounding
from graph_passes.ops import DOMAIN
from reference.checkpoint import Checkpoint, some
from reference.weights import PackedSource, Source, WeightSource
from runtime.errors import ExportError
from runtime.manifest import FP32, SCHEMA_VERSION, STORED

MODEL_FILE = "model.onnx"
GRAPH_ALLOWANCE = 64 << 20
"""Disk space kept for everything that is not a weight."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """What becomes of the weights: `kind` as in the manifest, and the `file` that they are copied into.

    file: None leaves them in the checkpoint's files. sources: of every parameter. files: the checkpoint's with weights.
    quantized: what the file is, where weights in it are quantised.
    """

    kind: str
    file: WeightsFile | None
    sources: Mapping[str, Source]
    files: tuple[Path, ...]
    quantized: QuantizedFile | None = None

    @property
    def disk_bytes(self) -> int:
        """What the bundle takes on disk at most."""
        return GRAPH_ALLOWANCE + (0 if self.file is None else self.file.nbytes)

    def formats(self, recipes: Sequence[Recipe]) -> dict[str, LinearFormat]:
        """How the graph reads each matrix, of which `recipes` make those that are not quantised."""
        stored = stored_formats(recipes)
        if self.quantized is None:
            return stored
        made: dict[str, LinearFormat] = {
            name: stored[name]
            if isinstance(decision, str)
            else Quantized(decision.bits, decision.block_size, decision.zero_points, decision.scale)
            for name, decision in self.quantized.decisions.by_parameter.items()
            if name in stored or not isinstance(decision, str)
        }
        return made


def plan_weights(
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    weights: str,
    copy: bool,
    quantize: QuantizeOptions | None = None,
) -> WeightsPlan:
    """Decide what becomes of the weights; see `exporter.compile.export`.

    quantize: for the quantised kinds. Raises ExportError for stored types that no graph of the bundle's arithmetic can
    read, and as `exporter.quantize.decide.decide` does.
    """
    names = dict.fromkeys(name for source in sources.values() for name in tensors_of(source))
    tensors = {name: checkpoint.tensors[name] for name in names}
    files = tuple(sorted({entry.file for entry in tensors.values()}))
    if weights in QUANTIZED_KINDS or (weights == STORED and is_quantized(sources)):
        planned = plan_quantized_file(decide(checkpoint, sources, quantize))
        return WeightsPlan(weights, planned.layout, sources, files, planned)
    plain = all(isinstance(source, WeightSource) and source.is_one_tensor for source in sources.values())
    plain = plain and {entry.dtype for entry in tensors.values()} == {"F32"}
    if weights == FP32 and (copy or not plain):
        return WeightsPlan(FP32, plan_file(checkpoint, sources, FP32), sources, files)
    unreadable = [f"{name} ({entry.dtype})" for name, entry in tensors.items() if entry.dtype not in TYPES]
    if unreadable:
        raise ExportError(
            f"{checkpoint.path} stores {len(unreadable)} tensors in a type that an engine of float32 cannot read "
            f"exactly ({some(unreadable, 2)}). Pass --weights fp32 (weights='fp32') to convert them, which refuses "
            "values that float32 cannot hold."
        )
    return WeightsPlan(STORED, plan_file(checkpoint, sources, STORED) if copy else None, sources, files)


def tensors_of(source: Source) -> tuple[str, ...]:
    """Names of the checkpoint's tensors that the parameter is made of."""
    return source.tensors if isinstance(source, PackedSource) else tuple(piece.tensor for piece in source.pieces)


@dataclass(frozen=True, slots=True)
class Job:
    """What an export has found out and decided before it writes. seen: the files that it reads, as they were."""

    checkpoint: Checkpoint
    plan: ExportPlan
    weights: WeightsPlan
    tokenizer: tuple[Path, ...]
    frontend: Frontend
    options: Mapping[str, Any]
    hashes: bool
    seen: Mapping[Path, State]


def write_bundle(folder: Path, job: Job, model: ir.Model, fusion: Mapping[str, Any], progress: Progress | None) -> None:
    """All files of the bundle. `model` gets its weights bound.

    Raises ExportError, TraceError and CheckpointError as the stages do, and OSError as the file system does.
    """
    checkpoint, weights = job.checkpoint, job.weights
    tokenizer = [file.name for file in job.tokenizer]
    placement, recipes = _placed(folder, job, tokenizer)
    recipes = with_equal_experts(recipes)
    lower_linears(model, weights.formats(recipes))
    lower_kv(model, job.plan.kv)
    if weights.quantized is not None:
        allow_rounding(model)
    bind_weights(model, recipes)
    write_graph(folder, model, placement.names.values() if weights.file is None else [WEIGHTS_FILE])
    for file in job.tokenizer:
        shutil.copyfile(file, folder / file.name)
    written: dict[str, dict[str, Any]] = {}
    if weights.file is not None:
        path = folder / WEIGHTS_FILE
        if weights.quantized is not None:
            sha256 = write_quantized_file(checkpoint, weights.quantized, path, progress)
        else:
            sha256 = write_weights(checkpoint, weights.sources, weights.file, path, progress)
        written[WEIGHTS_FILE] = large_entry(path, sha256)
    hashed = large_entries(weights.files, hashes=job.hashes, progress=progress)
    files = written or {placement.names[file]: entry for file, entry in hashed.items()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "cierzo_version": version("cierzo"),
        "model": model_section(job.plan, weights.sources),
        "graph": graph_section(MODEL_FILE),
        "kv": kv_section(job.plan),
        "weights": weights_section(weights.kind, weights.quantized, placement, recipes, files),
        "tokenizer": tokenizer,
        "files": {name: own_entry(folder / name) for name in (MODEL_FILE, *tokenizer)},
        "provenance": provenance_section(checkpoint, job.tokenizer, hashed, job.frontend, job.options),
        "fusion": {**fusion, "nodes": _plugin_nodes(model)},
    }
    require_unchanged(job.seen)
    write_manifest(folder, manifest)


def _plugin_nodes(model: ir.Model) -> dict[str, int]:
    """How many nodes of each plugin op the lowered graph has."""
    return dict(sorted(Counter(node.op_type for node in model.graph if node.domain == DOMAIN).items()))


def _placed(folder: Path, job: Job, tokenizer: Collection[str]) -> tuple[Placement, list[Recipe]]:
    weights = job.weights
    if weights.file is not None:
        return IN_THE_BUNDLE, weights.file.recipes()
    # Quantised checkpoints have a file: no graph reads their layout.
    plain = {name: source for name, source in weights.sources.items() if isinstance(source, WeightSource)}
    placement = place(weights.files, folder, taken=[MODEL_FILE, MANIFEST_FILE, *tokenizer])
    return placement, referenced(job.checkpoint, plain, placement.names)


def write_graph(folder: Path, model: ir.Model, locations: Collection[str]) -> None:
    """Write the graph, checked in full, shapes inferred.

    The checker wants every external file to be there, in the graph's own folder and with one name only, and reads none
    of them. So it meets the graph in a folder with empty files of these names.
    """
    workbench = folder / "checking"
    workbench.mkdir()
    for location in dict.fromkeys(locations):
        (workbench / location).touch()
    checked = workbench / MODEL_FILE
    checked.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    onnx.checker.check_model(str(checked), full_check=True)
    checked.rename(folder / MODEL_FILE)
    shutil.rmtree(workbench)
