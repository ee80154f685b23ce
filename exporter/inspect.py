"""What a checkpoint, a bare config.json or a bundle is: parameters, KV memory, receptive field. Pure arithmetic.

Nothing here loads weights, and torch is not imported: sizes come from config.json, tensor headers and the manifest.

Letters: L layers, G KV heads, D head dim, W window, S slots of a ring, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Console

    from reference.checkpoint import Checkpoint
    from reference.config import ModelConfig

CONTEXTS = (1024, 4096, 32_768, 131_072)
"""Tokens of context for which the KV table has a row: 1K, 4K, 32K, 128K."""

GROUPS = ("embedding", "attention", "mlp", "experts", "router", "norms", "lm_head")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of the model. None: a bundle's manifest does not record it (or there are no experts)."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    intermediate_size: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    activation: str | None = None
    rope_type: str | None = None
    rope_theta: float | None = None
    tie_word_embeddings: bool | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of parameters.

    active: those that one token passes through: all but the E - top_k experts of each layer that it does not visit.
    groups: by part of the model, in the order of GROUPS, without empty ones. Both are None for a bundle.
    """

    total: int
    active: int | None = None
    groups: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class KVUse:
    """Bytes of keys and values for one sequence of `context` tokens.

    windowed: what a ring needs at least, min(context, W) rows in layers with a window. full: without any window.
    """

    context: int
    windowed_fp32: int
    full_fp32: int
    windowed_fp16: int
    full_fp16: int


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """How many tokens, the current one included, can influence one output.

    exact: 1 + sum over layers of (W - 1), which is L·(W - 1) + 1 for equal windows: each layer reaches W - 1 tokens
        further back. customary: the sum of W, L·W, which papers quote. Both None when a layer has full attention.
    layer_windows: W or None for each layer.
    """

    exact: int | None
    customary: int | None
    layer_windows: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensor files of a checkpoint. dtypes: tensors by stored type. unused: name and reason of tensors not read."""

    files: int
    tensors: int
    bytes: int
    dtypes: Mapping[str, int]
    unused: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """What a manifest says. kv_bytes_per_row and kv_bytes (max_batch rows): 2·B·G·D·bytes·(sum of S over layers)."""

    cierzo_version: str
    opset: int
    weights_dtype: str
    kv_dtype: str
    chunk: int
    max_batch: int
    context: int | None
    capacities: tuple[int, ...]
    kv_bytes_per_row: int
    kv_bytes: int
    files: Mapping[str, int]
    tokenizer: tuple[str, ...]
    fusion: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class InspectReport:
    """Everything that `cierzo inspect` shows. kind: "config", "checkpoint" or "bundle"."""

    path: str
    kind: str
    model: ModelFacts
    parameters: ParameterCount
    kv: tuple[KVUse, ...]
    receptive_field: ReceptiveField
    stored: StoredTensors | None = None
    bundle: BundleFacts | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; parts that this kind of path does not have are null."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def inspect_path(path: str | Path, *, ignore_config_keys: Collection[str] = ()) -> InspectReport:
    """Report on a bundle folder, a checkpoint folder (its tensors are checked too), or a config.json.

    A folder without safetensors is reported from its config.json alone.
    Raises BundleError, CheckpointError or ConfigError for whatever the path holds but cannot be represented exactly.
    """
    from reference.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, open_checkpoint, read_config
    from runtime.bundle import MANIFEST_NAME

    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give a checkpoint folder, a config.json or a bundle.")
    if path.name == MANIFEST_NAME:
        return _inspect_bundle(path.parent)
    if path.is_file():
        return _inspect_config(path, read_config(path, ignore_keys=ignore_config_keys))
    if (path / MANIFEST_NAME).is_file():
        return _inspect_bundle(path)
    if (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return _inspect_checkpoint(open_checkpoint(path, ignore_config_keys=ignore_config_keys))
    return _inspect_config(path, read_config(path / CONFIG_FILE, ignore_keys=ignore_config_keys))


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


def _inspect_config(path: Path, config: ModelConfig) -> InspectReport:
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
        ),
        parameters=count_parameters(config),
        kv=tuple(kv_use(config.layer_windows, config.num_kv_heads, config.head_dim, context) for context in CONTEXTS),
        receptive_field=receptive_field(config.layer_windows),
    )


def _inspect_checkpoint(checkpoint: Checkpoint) -> InspectReport:
    from dataclasses import replace

    from reference.weights import bind, unused_reason

    used = {piece.tensor for source in bind(checkpoint).values() for piece in source.pieces}
    entries = checkpoint.tensors.values()
    dtypes = [entry.dtype for entry in entries]
    stored = StoredTensors(
        files=len({entry.file for entry in entries}),
        tensors=len(entries),
        bytes=sum(entry.nbytes for entry in entries),
        dtypes={dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))},
        unused={name: unused_reason(checkpoint.config, name) or "" for name in checkpoint.tensors if name not in used},
    )
    return replace(_inspect_config(checkpoint.path, checkpoint.config), kind="checkpoint", stored=stored)


def _inspect_bundle(folder: Path) -> InspectReport:
    from runtime.bundle import MANIFEST_NAME, read_bundle
    from runtime.rolling_kv import kv_bytes

    manifest = read_bundle(folder).manifest
    model, kv = manifest.model, manifest.kv
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
            weights_dtype=manifest.weights.dtype,
            kv_dtype=kv.dtype,
            chunk=kv.chunk,
            max_batch=kv.max_batch,
            context=kv.context,
            capacities=capacities,
            kv_bytes_per_row=per_row,
            kv_bytes=per_row * kv.max_batch,
            files={name: info.bytes for name, info in manifest.files.items()},
            tokenizer=manifest.tokenizer,
            # The manifest's reader leaves this part alone: it is a report about building, not about running.
            fusion=json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")).get("fusion") or {},
        ),
    )
