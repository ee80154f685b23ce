"""The way from a checkpoint to a bundle, stage by stage."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from exporter.defaults import DEFAULT_MAX_BATCH, FRONTENDS, WEIGHT_KINDS
from exporter.frontends import REFERENCE, Frontend, open_frontend, trace
from exporter.plan import ExportPlan, make_plan
from exporter.save import bundle_folder, file_entry, refuse_existing, refuse_full_disk, write_manifest
from exporter.stitch import stitch
from exporter.trace import (
    INPUT_IDS,
    LOGITS,
    START_POSITIONS,
    TOKEN_COUNTS,
    past_names,
    present_names,
)
from exporter.weights import WEIGHTS_FILE, bind_weights, weight_bytes, write_weights
from graph_passes import pipeline
from graph_passes.fuse.sliding_window import LONGEST_WINDOW
from graph_passes.ops import DOMAIN, OPSET
from graph_passes.ops.grouped_query_attention import GROUPED_QUERY_ATTENTION
from graph_passes.ops.sliding_window_attention import FULL, SLIDING_WINDOW_ATTENTION
from graph_passes.region import IR_VERSION
from reference.checkpoint import Checkpoint, open_checkpoint
from reference.torch_state import plain_torch
from reference.weights import WeightSource, bind
from runtime.errors import ExportError, FusionError

SCHEMA_VERSION = 1
MODEL_FILE = "model.onnx"
_GRAPH_ALLOWANCE = 64 << 20
"""Disk space kept for everything that is not a weight."""

_VERSIONED = ("cierzo", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")

Progress = Callable[[str, int, int], None]


@plain_torch()
def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: str = "fp32",
    chunk: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    context: int | None = None,
    prove: bool = True,
    dump_passes: str | Path | None = None,
    progress: Progress | None = None,
    ignore_config_keys: Collection[str] = (),
    frontend: str = FRONTENDS[0],
    attention: str | None = None,
) -> Path:
    """Compile the Hugging Face checkpoint in folder `checkpoint` into the bundle folder `out`, and return `out`.

    weights: dtype of the bundle's weights and arithmetic; "fp32" so far.
    chunk, max_batch, context: see `exporter.plan`.
    prove: hold every fusion numerically against the nodes that it replaces.
    dump_passes: a folder that gets the template's graph before and after each pass.
    progress: called with (stage, done, total).
    ignore_config_keys: keys of config.json that are known to change nothing.
    frontend, attention: what is traced, "reference" or "transformers", and for the latter with "sdpa" (the default) or
        "eager" attention; see `exporter.frontends`. The bundle is the same function with the same plugin nodes.

    Raises ConfigError and CheckpointError for what the checkpoint is, ExportError and its children for everything
    later. `out` exists afterwards, whole, or not at all.
    """
    target = Path(out).expanduser().absolute()
    if weights not in WEIGHT_KINDS:
        raise ExportError(f"weights = {weights!r} is not one that this version writes ({', '.join(WEIGHT_KINDS)}).")
    refuse_existing(target)
    dump_folder = None if dump_passes is None else _made_dump_folder(Path(dump_passes), target)
    opened = open_checkpoint(checkpoint, ignore_config_keys=ignore_config_keys)
    chosen = open_frontend(frontend, attention, opened, ignore_config_keys)
    sources = bind(opened)
    plan = make_plan(opened.config, chunk=chunk, max_batch=max_batch, context=context)
    refuse_full_disk(target, weight_bytes(sources) + _GRAPH_ALLOWANCE)
    model, report = build_graph(plan, frontend=chosen, prove=prove, dump_folder=dump_folder, progress=progress)
    options = {
        "frontend": chosen.name,
        "attention": chosen.attention,
        "weights": weights,
        "chunk": plan.chunk,
        "max_batch": max_batch,
        "context": plan.context,
        "prove": prove,
        "ignore_config_keys": sorted(ignore_config_keys),
    }
    with bundle_folder(target) as folder:
        _write(folder, opened, sources, plan, model, report, chosen, options, progress)
    return target


def _made_dump_folder(dump_passes: Path, target: Path) -> Path:
    """The folder for the graphs between passes; raises ExportError when it cannot be made, or lies in the bundle."""
    folder = dump_passes.expanduser().absolute()
    if target in (folder, *folder.parents):
        raise ExportError(f"The passes cannot be dumped into the bundle {target} itself. Choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"The folder {folder} for the dumped passes cannot be made: {error}.") from error
    return folder


@plain_torch()
def build_graph(
    plan: ExportPlan,
    *,
    frontend: Frontend = REFERENCE,
    prove: bool = True,
    dump_folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[ir.Model, pipeline.PipelineReport]:
    """The fused graph of all layers with unbound weights, and what the passes did to its template.

    Raises ExportError for a window too wide to be recognised, and FusionError when the whole model does not hold each
    plugin node as often as the architecture says.
    """
    widest = max((window for window in plan.kinds if window is not None), default=0)
    if widest > LONGEST_WINDOW:
        raise ExportError(
            f"config.json says a sliding window of {widest:,} tokens, and masks are recognised up to {LONGEST_WINDOW:,}"
            " only. If no text will be that long, set sliding_window to null there and give the --context you need."
        )
    if progress is not None:
        progress("tracing", 0, 1)
    template = trace(plan, frontend)
    twin = trace(plan.twin, frontend) if plan.twin is not None else None
    if progress is not None:
        progress("tracing", 1, 1)
    report = pipeline.run(
        template,
        expected_fusions(plan, len(plan.kinds)),
        twin=twin,
        proving=prove,
        dump_folder=dump_folder,
        progress=progress,
    )
    model = stitch(template, plan)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "cierzo", _version("cierzo")
    model.graph.name = f"{plan.config.architecture}-{plan.config.num_layers}"
    _check_nodes(model, plan)
    return model, report


def expected_fusions(plan: ExportPlan, layers: int) -> dict[str, int]:
    """How often each rule must fire in a graph of `layers` layers: query and key turn, key and value are written."""
    expected = {"rope": 2 * layers, "rolling_kv": 2 * layers, "gqa": layers, "sliding_window": layers}
    if plan.config.moe is not None:
        expected |= {"moe_gate": layers, "moe": layers}
    else:
        expected |= {"gated_activation": layers}
    return expected


def expected_nodes(plan: ExportPlan) -> dict[str, int]:
    """How often each plugin node must be in the whole model."""
    rules = expected_fusions(plan, plan.config.num_layers)
    by_op = {rule.op.name: rules.get(rule.name, 0) for rule, _ in pipeline.PIPELINE}
    by_op[GROUPED_QUERY_ATTENTION.name] = 0  # each has become a SlidingWindowAttention
    return by_op


def _check_nodes(model: ir.Model, plan: ExportPlan) -> None:
    """The contract on the whole model: node counts, and each layer's own window on its attention node."""
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    for op, expected in expected_nodes(plan).items():
        found = sum(node.op_type == op for node in nodes)
        if found != expected:
            raise FusionError(f"The model holds {found} nodes of {op} where {expected} are due. Nothing was written.")
    attention = [node for node in nodes if node.op_type == SLIDING_WINDOW_ATTENTION.name]
    windows = tuple(node.attributes["window"].as_int() for node in attention)
    due = tuple(FULL if window is None else window for window in plan.config.layer_windows)
    if windows != due:
        raise FusionError(
            f"The attention nodes were found to have the windows {windows} and config.json says {due} "
            f"({FULL} is full attention). Nothing was written."
        )


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    plan: ExportPlan,
    model: ir.Model,
    report: pipeline.PipelineReport,
    frontend: Frontend,
    options: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    """All files of the bundle, the manifest last."""
    written = write_weights(checkpoint, sources, folder / WEIGHTS_FILE, progress)
    bind_weights(model, written, folder)
    proto = ir.to_proto(model)
    (folder / MODEL_FILE).write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
    for file in checkpoint.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    tokenizer = [file.name for file in checkpoint.tokenizer_files]
    files = {name: file_entry(folder / name) for name in (MODEL_FILE, *tokenizer)}
    files[WEIGHTS_FILE] = file_entry(folder / WEIGHTS_FILE, written.sha256)
    write_manifest(
        folder,
        {
            "schema_version": SCHEMA_VERSION,
            "cierzo_version": _version("cierzo"),
            "model": _model_section(plan, sources),
            "graph": {
                "file": MODEL_FILE,
                "opset": OPSET,
                "input_ids": INPUT_IDS,
                "start_positions": START_POSITIONS,
                "token_counts": TOKEN_COUNTS,
                "logits": LOGITS,
            },
            "kv": _kv_section(plan),
            "weights": {"file": WEIGHTS_FILE, "dtype": options["weights"]},
            "tokenizer": tokenizer,
            "files": files,
            "provenance": {
                "checkpoint": str(checkpoint.path),
                "versions": {name: _version(name) for name in (*_VERSIONED, *frontend.distributions)},
                "options": dict(options),
            },
            "fusion": {"nodes": expected_nodes(plan), **report.to_json()},
        },
    )


def _model_section(plan: ExportPlan, sources: Mapping[str, WeightSource]) -> dict[str, Any]:
    config = plan.config
    return {
        "architecture": config.architecture,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": list(config.eos_token_ids),
        "parameters": sum(math.prod(source.shape) for source in sources.values()),
    }


def _kv_section(plan: ExportPlan) -> dict[str, Any]:
    layers = []
    for layer, kind in enumerate(plan.kind_of_layer):
        (past_key, past_value), (present_key, present_value) = past_names(layer), present_names(layer)
        layers.append(
            {
                "window": plan.kinds[kind],
                "capacity": plan.capacity(kind),
                "past_key": past_key,
                "past_value": past_value,
                "present_key": present_key,
                "present_value": present_value,
            }
        )
    return {
        "dtype": "float32",
        "chunk": plan.chunk,
        "max_batch": plan.max_batch,
        "context": plan.context,
        "layers": layers,
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree that was never installed
