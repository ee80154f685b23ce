"""Writes the files of a bundle into its folder: graph, weights or links to them, tokenizer, and the manifest last."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

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
from exporter.recipes import TYPES, Recipe, bind_weights, referenced
from exporter.save import MANIFEST_FILE, write_manifest
from exporter.unchanged import State, require_unchanged
from exporter.weights import WEIGHTS_FILE, WeightsFile, plan_file, write_weights
from reference.checkpoint import Checkpoint, some
from reference.weight_source import WeightSource
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
    """

    kind: str
    file: WeightsFile | None
    sources: Mapping[str, WeightSource]
    files: tuple[Path, ...]

    @property
    def disk_bytes(self) -> int:
        """What the bundle takes on disk at most."""
        return GRAPH_ALLOWANCE + (0 if self.file is None else self.file.nbytes)


def plan_weights(checkpoint: Checkpoint, sources: Mapping[str, WeightSource], weights: str, copy: bool) -> WeightsPlan:
    """Decide what becomes of the weights; see `exporter.compile.export`.

    Raises ExportError for stored types that no graph of the bundle's arithmetic can read.
    """
    tensors = {piece.tensor: checkpoint.tensors[piece.tensor] for s in sources.values() for piece in s.pieces}
    files = tuple(sorted({entry.file for entry in tensors.values()}))
    plain = all(source.is_one_tensor for source in sources.values()) and {e.dtype for e in tensors.values()} == {"F32"}
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
    bind_weights(model, recipes)
    write_graph(folder, model, placement.names.values() if weights.file is None else [WEIGHTS_FILE])
    for file in job.tokenizer:
        shutil.copyfile(file, folder / file.name)
    written: dict[str, dict[str, Any]] = {}
    if weights.file is not None:
        sha256 = write_weights(checkpoint, weights.sources, weights.file, folder / WEIGHTS_FILE, progress)
        written[WEIGHTS_FILE] = large_entry(folder / WEIGHTS_FILE, sha256)
    hashed = large_entries(weights.files, hashes=job.hashes, progress=progress)
    files = written or {placement.names[file]: entry for file, entry in hashed.items()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "cierzo_version": version("cierzo"),
        "model": model_section(job.plan, weights.sources),
        "graph": graph_section(MODEL_FILE),
        "kv": kv_section(job.plan),
        "weights": weights_section(weights.kind, placement, recipes, files),
        "tokenizer": tokenizer,
        "files": {name: own_entry(folder / name) for name in (MODEL_FILE, *tokenizer)},
        "provenance": provenance_section(checkpoint, job.tokenizer, hashed, job.frontend, job.options),
        "fusion": dict(fusion),
    }
    require_unchanged(job.seen)
    write_manifest(folder, manifest)


def _placed(folder: Path, job: Job, tokenizer: Collection[str]) -> tuple[Placement, list[Recipe]]:
    weights = job.weights
    if weights.file is not None:
        return IN_THE_BUNDLE, weights.file.recipes(weights.sources)
    placement = place(weights.files, folder, taken=[MODEL_FILE, MANIFEST_FILE, *tokenizer])
    return placement, referenced(job.checkpoint, weights.sources, placement.names)


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
