"""The sections of a bundle's manifest; docs/manifest.schema.json describes each key."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.frontends import Frontend
from exporter.hashing import small_entry
from exporter.placement import Placement
from exporter.plan import ExportPlan
from exporter.quantize.decide import Decisions
from exporter.quantize.file import QuantizedFile
from exporter.recipe import Recipe
from exporter.trace import (
    INPUT_IDS,
    LOGIT_POSITIONS,
    LOGITS,
    START_POSITIONS,
    TOKEN_COUNTS,
    past_names,
    present_names,
)
from graph_passes.ops import OPSET
from reference.checkpoint import Checkpoint
from reference.layouts import layout_of
from reference.weights import Source

_VERSIONED = ("cierzo", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")

Entry = dict[str, Any]


def model_section(plan: ExportPlan, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Sizes of the model, and the ids that begin and end a text."""
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


def graph_section(file: str) -> dict[str, Any]:
    """The ONNX file and the names of its inputs and outputs, apart from the rings."""
    return {
        "file": file,
        "opset": OPSET,
        "input_ids": INPUT_IDS,
        "start_positions": START_POSITIONS,
        "token_counts": TOKEN_COUNTS,
        "logit_positions": LOGIT_POSITIONS,
        "logits": LOGITS,
    }


def kv_section(plan: ExportPlan) -> dict[str, Any]:
    """The rings: what a layer's `past_*` and `present_*` name is one buffer, bound twice."""
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
        "dtype": plan.kv,
        "chunk": plan.chunk,
        "max_batch": plan.max_batch,
        "context": plan.context,
        "position_limit": plan.config.position_limit,
        "layers": layers,
    }


def weights_section(
    kind: str,
    quantized: QuantizedFile | None,
    placement: Placement,
    recipes: Sequence[Recipe],
    files: Mapping[str, Entry],
) -> dict[str, Any]:
    """Where the weights lie and as what."""
    types = Counter(piece.dtype for recipe in recipes for piece in recipe.pieces)
    return {
        "kind": kind,
        "quantization": None if quantized is None else _quantization(quantized.decisions),
        "arithmetic": "float32",
        "placement": placement.kind,
        "folder": None if placement.folder is None else str(placement.folder),
        "types": dict(sorted(types.items())),
        "folded_bytes": sum(recipe.folded_bytes for recipe in recipes),
        "folding_bytes": sum(recipe.folding_bytes for recipe in recipes),
        "made_bytes": sum(recipe.made_bytes for recipe in recipes),
        "making_bytes": sum(recipe.making_bytes for recipe in recipes),
        "files": dict(files),
    }


def _quantization(decisions: Decisions) -> Entry:
    main = decisions.main
    return {
        "bits": main.bits,
        "block_size": main.block_size,
        "zero_points": main.zero_points,
        "scales": {"F16": "float16", "F32": "float32"}[main.scale],
        "method": decisions.method,
        "kept": decisions.kept,
    }


def small_files(checkpoint: Checkpoint, tokenizer: Sequence[Path]) -> list[Path]:
    """The checkpoint's files that are read and hold no tensors: config, index if there is one, tokenizer."""
    index = checkpoint.path / layout_of(checkpoint.path, checkpoint.layout).index
    return [checkpoint.config_file, *([index] if index.is_file() else []), *tokenizer]


def provenance_section(
    checkpoint: Checkpoint,
    tokenizer: Sequence[Path],
    tensor_files: Mapping[Path, Entry],
    frontend: Frontend,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The checkpoint with every file that the bundle was made from, the versions of everything, and the options."""
    entries = {file.name: small_entry(file) for file in small_files(checkpoint, tokenizer)}
    entries |= {file.name: entry for file, entry in tensor_files.items()}
    return {
        "checkpoint": str(checkpoint.path),
        "layout": checkpoint.layout,
        "config": checkpoint.config_file.name,
        "files": entries,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in (*_VERSIONED, *frontend.distributions)},
        "options": dict(options),
    }


def version(distribution: str) -> str:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree that was never installed
