"""What `cierzo inspect` reports, as plain data: the same for a checkpoint, a bare config and a bundle.

Letters: L layers, G KV heads, D head dim, W window, S slots of a ring, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runtime.estimate import MemoryEstimate

Nodes = Mapping[str, Mapping[str, Mapping[str, int]]]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of the model. None: a bundle's manifest does not record it (or there are no experts).

    quantization: how a checkpoint packs its matrices; None where all are plain.
    """

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
    layout: str | None = None
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of parameters.

    active: those that one token passes through: all but the E - top_k experts of each layer that it does not visit.
    groups: by part of the model, in the order of `exporter.inspect.GROUPS`, without empty ones.
    Both are None for a bundle.
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
class KernelFacts:
    """How the backend onnxruntime runs the nodes of a bundle's graph on this machine: op to number of nodes.

    library: the shared library with the kernels; isa: the level of instructions that it uses here. native: what it
    runs. bodies: the ops that run their portable function bodies. standard: those that ONNX Runtime's own kernels run.
    reason: why no kernels are active, a sentence, and None when they are.
    """

    library: str | None
    isa: str | None
    native: Mapping[str, int]
    bodies: Mapping[str, int]
    standard: Mapping[str, int]
    reason: str | None


@dataclass(frozen=True, slots=True)
class LoweredFacts:
    """An engine that could be built, with graphs: where their nodes would run, graph -> provider -> op -> nodes."""

    backend: str
    arithmetic: str
    nodes: Nodes


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """An engine that was built of a bundle; see `runtime.engine_info` and `runtime.step_engine_info`.

    bytes: of its plans or graphs. flavor, compute_capability, plugins, weights: of engines with plans. nodes: of
    engines with graphs, where they run: graph -> provider -> op -> nodes. problem: why it cannot be read; then nothing
    else is known of it but its name.
    """

    name: str
    backend: str | None = None
    flavor: str | None = None
    version: str | None = None
    compute_capability: str | None = None
    arithmetic: str | None = None
    kv: str | None = None
    plugins: tuple[str, ...] = ()
    weights: str | None = None
    bytes: int | None = None
    nodes: Nodes | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ReceiptFacts:
    """A receipt of parity; see `runtime.parity_receipt`. made: UTC. signed_by: a public key in base64, unverified.

    problem: why it does not fit the manifest and the small files, or why it cannot be read; then nothing else is known.
    """

    backend: str | None = None
    engine: str | None = None
    suite: str | None = None
    device: str | None = None
    made: str | None = None
    cierzo_version: str | None = None
    signed_by: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """What a manifest says. kv_bytes_per_row and kv_bytes (max_batch rows): 2·B·G·D·bytes·(sum of S over layers).

    weights_types: tensors that the graph reads, by stored type. weights_placement: "copied" or "linked" into the
        bundle, or left in a "folder", which is then weights_folder. folded_bytes: see `runtime.manifest.WeightsInfo`.
    quantization: how weights are quantised, in words; None where they are not.
    files: bytes of all files but the manifest and those of engines; those with weights included.
    kernels: on this machine. memory, memory_of_all_rows: what a session takes here for one row and for max_batch.
    lowered: an engine that was asked for and need not be built.
    """

    cierzo_version: str
    opset: int
    arithmetic: str
    weights_types: Mapping[str, int]
    weights_placement: str
    weights_folder: str | None
    folded_bytes: int
    quantization: str | None
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
    kernels: KernelFacts
    memory: MemoryEstimate
    memory_of_all_rows: MemoryEstimate
    engines: tuple[EngineFacts, ...] = ()
    lowered: LoweredFacts | None = None
    receipts: tuple[ReceiptFacts, ...] = ()


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
