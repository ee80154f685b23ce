"""What a checkpoint, a bare config.json or a bundle is: parameters, KV memory, receptive field. Pure arithmetic.

Nothing here loads weights, and torch is not imported: sizes come from config.json, tensor headers and the manifest.

Letters: L layers, G KV heads, D head dim, W window, S slots of a ring, E experts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.inspect_engines import engine_facts, lowered_facts
from exporter.inspect_report import (
    BundleFacts,
    InspectReport,
    KernelFacts,
    KVUse,
    ModelFacts,
    ParameterCount,
    ReceptiveField,
    StoredTensors,
)
from runtime.errors import BackendError, BundleError, CheckpointError

if TYPE_CHECKING:
    from rich.console import Console

    from reference.checkpoint import Checkpoint
    from reference.config import ModelConfig

__all__ = [
    "CONTEXTS",
    "GROUPS",
    "InspectReport",
    "count_parameters",
    "inspect_path",
    "kv_use",
    "receptive_field",
    "render",
]

CONTEXTS = (1024, 4096, 32_768, 131_072)
"""Tokens of context for which the KV table has a row: 1K, 4K, 32K, 128K."""

GROUPS = ("embedding", "attention", "mlp", "experts", "router", "norms", "lm_head")


def inspect_path(
    path: str | Path,
    *,
    ignore_config_keys: Collection[str] = (),
    layout: str | None = None,
    text_only: bool = False,
    backend: str | None = None,
    arithmetic: str | None = None,
) -> InspectReport:
    """Report on a bundle folder, a checkpoint folder (its tensors are checked too), a config.json or a params.json.

    A folder without safetensors is reported from its config alone. layout, text_only: see
    `reference.checkpoint.open_checkpoint`; a bundle has neither.
    backend, arithmetic: of an engine of a bundle whose nodes are to be placed as if it were built; see
    `exporter.build.build.build`.
    Raises BackendError where that cannot be told, and BundleError, CheckpointError or ConfigError for whatever the path
    holds but cannot be represented exactly.
    """
    from reference.checkpoint import describe
    from runtime.bundle import MANIFEST_NAME

    if arithmetic is not None and backend is None:
        raise BackendError("An arithmetic is that of an engine. Say for which backend: --backend onnxruntime-cuda.")
    path = Path(os.path.expanduser(path)).absolute()
    if not os.path.lexists(path):  # where a link leads is found out when it is opened
        raise CheckpointError(
            f"{path} does not exist. Give a checkpoint folder, a config.json, a params.json or a bundle."
        )
    if path.name == MANIFEST_NAME:
        return _inspect_bundle(path.parent, backend, arithmetic)
    if (path / MANIFEST_NAME).is_file():
        return _inspect_bundle(path, backend, arithmetic)
    if backend is not None:
        raise BundleError(
            f"{path} is no bundle, and only the graph of a bundle has nodes that run somewhere. Export it first, or "
            "leave out --backend."
        )
    found = describe(path, ignore_config_keys=ignore_config_keys, layout=layout, text_only=text_only)
    if found.checkpoint is not None:
        return _inspect_checkpoint(found.checkpoint)
    return _inspect_config(path, found.config, found.layout)


def render(report: InspectReport, console: Console) -> None:
    """Draw the report as tables that stay readable at 80 columns."""
    from exporter.inspect_tables import draw

    draw(report, console)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model that `config` describes; a tied output projection counts once, as embedding."""
    from math import prod

    from reference.weights import parameter_shapes

    groups = dict.fromkeys(GROUPS, 0)
    for name, shape in parameter_shapes(config).items():
        groups[_group(name)] += prod(shape)
    total = sum(groups.values())
    idle = 0 if config.moe is None else groups["experts"] // config.moe.num_experts
    active = total - idle * (0 if config.moe is None else config.moe.num_experts - config.moe.top_k)
    return ParameterCount(total, active, {name: count for name, count in groups.items() if count})


def _group(parameter: str) -> str:
    marks = {
        "embed_tokens": "embedding",
        "lm_head": "lm_head",
        "norm.": "norms",
        ".moe.router": "router",
        ".moe.": "experts",
        ".mlp.": "mlp",
        ".self_attn.": "attention",
    }
    return next(group for mark, group in marks.items() if mark in parameter.replace("layernorm.", "norm."))


def kv_use(layer_windows: Sequence[int | None], num_kv_heads: int, head_dim: int, context: int) -> KVUse:
    """KV bytes of one sequence of `context` tokens: keys and values, G heads of D numbers, for each row held."""
    windowed_rows = sum(context if window is None else min(context, window) for window in layer_windows)
    numbers_per_row = 2 * num_kv_heads * head_dim
    windowed, full = windowed_rows * numbers_per_row, context * len(layer_windows) * numbers_per_row
    return KVUse(context, windowed * 4, full * 4, windowed * 2, full * 2)


def receptive_field(layer_windows: Sequence[int | None]) -> ReceptiveField:
    """See `ReceptiveField`. Layers stack: each adds W - 1 tokens to what the one above it reaches."""
    windows = [window for window in layer_windows if window is not None]
    if len(windows) < len(layer_windows):
        return ReceptiveField(None, None, tuple(layer_windows))
    return ReceptiveField(1 + sum(window - 1 for window in windows), sum(windows), tuple(layer_windows))


def _inspect_config(path: Path, config: ModelConfig, layout: str) -> InspectReport:
    return InspectReport(
        path=str(path),
        kind="config",
        model=ModelFacts(
            architecture=config.architecture,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            intermediate_size=config.intermediate_size,
            num_experts=None if config.moe is None else config.moe.num_experts,
            top_k=None if config.moe is None else config.moe.top_k,
            activation=config.activation,
            rope_type=config.rope.type,
            rope_theta=config.rope.theta,
            tie_word_embeddings=config.tie_word_embeddings,
            dtype=config.dtype,
            layout=layout,
            quantization=None if config.quantization is None else str(config.quantization),
        ),
        parameters=count_parameters(config),
        kv=tuple(kv_use(config.layer_windows, config.num_kv_heads, config.head_dim, context) for context in CONTEXTS),
        receptive_field=receptive_field(config.layer_windows),
    )


def _inspect_checkpoint(checkpoint: Checkpoint) -> InspectReport:
    from dataclasses import replace

    from reference.weights import bind, reason_unused

    used = {name for source in bind(checkpoint).values() for name in source.tensors}
    entries, config = checkpoint.tensors.values(), checkpoint.config
    dtypes = [entry.dtype for entry in entries]

    stored = StoredTensors(
        files=len({entry.file for entry in entries}),
        tensors=len(entries),
        bytes=sum(entry.nbytes for entry in entries),
        dtypes={dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))},
        unused={name: reason_unused(checkpoint, name) or "" for name in checkpoint.tensors if name not in used},
    )
    return replace(_inspect_config(checkpoint.path, config, checkpoint.layout), kind="checkpoint", stored=stored)


def _inspect_bundle(folder: Path, backend: str | None, arithmetic: str | None) -> InspectReport:
    from exporter.inspect_receipts import receipt_facts
    from runtime.bundle import MANIFEST_NAME, read_bundle
    from runtime.estimate import estimate
    from runtime.rolling_kv import kv_bytes

    bundle = read_bundle(folder)
    manifest = bundle.manifest
    kernels = _kernels(bundle.file(manifest.graph.file))
    active = kernels.library is not None
    model, kv, weights = manifest.model, manifest.kv, manifest.weights
    windows = tuple(layer.window for layer in kv.layers)
    capacities = tuple(layer.capacity for layer in kv.layers)
    per_row = kv_bytes(capacities, batch=1, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=kv.dtype)
    return InspectReport(
        path=str(folder),
        kind="bundle",
        model=ModelFacts(
            architecture=model.architecture,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
        ),
        parameters=ParameterCount(model.parameters),
        kv=tuple(kv_use(windows, model.num_kv_heads, model.head_dim, context) for context in CONTEXTS),
        receptive_field=receptive_field(windows),
        bundle=BundleFacts(
            cierzo_version=manifest.cierzo_version,
            opset=manifest.graph.opset,
            arithmetic=weights.arithmetic,
            weights_types=dict(weights.types),
            weights_placement=weights.placement,
            weights_folder=weights.folder,
            folded_bytes=weights.folded_bytes,
            quantization=None if weights.quantization is None else str(weights.quantization),
            kv_dtype=kv.dtype,
            chunk=kv.chunk,
            max_batch=kv.max_batch,
            context=kv.context,
            capacities=capacities,
            kv_bytes_per_row=per_row,
            kv_bytes=per_row * kv.max_batch,
            files={name: info.bytes for name, info in {**manifest.files, **weights.files}.items()},
            tokenizer=manifest.tokenizer,
            # The manifest's reader leaves this part alone: it is a report about building, not about running.
            fusion=json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")).get("fusion") or {},
            kernels=kernels,
            memory=estimate(manifest, kernels_active=active),
            memory_of_all_rows=estimate(manifest, batch=kv.max_batch, kernels_active=active),
            engines=tuple(engine_facts(bundle, name) for name in manifest.engines),
            lowered=None if backend is None else lowered_facts(bundle, backend, arithmetic),
            receipts=receipt_facts(bundle),
        ),
    )


def _kernels(graph: Path) -> KernelFacts:
    from runtime.graph_ops import PLUGIN_DOMAIN, all_ops
    from runtime.kernels import kernels, why_none

    nodes, found = all_ops(graph), kernels()
    ops = {op: number for (domain, op), number in nodes.items() if domain == PLUGIN_DOMAIN}
    known = () if found is None else found.ops
    return KernelFacts(
        library=None if found is None else str(found.library),
        isa=None if found is None else found.isa,
        native={op: number for op, number in ops.items() if op in known},
        bodies={op: number for op, number in ops.items() if op not in known},
        standard={op: number for (domain, op), number in nodes.items() if domain != PLUGIN_DOMAIN},
        reason=why_none(),
    )
