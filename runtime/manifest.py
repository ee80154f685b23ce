"""The manifest of a bundle: the only contract between building and running. docs/manifest.schema.json describes it.

`parse_manifest` turns the JSON text of `manifest.json` into frozen dataclasses and refuses whatever contradicts itself,
so that no later stage meets a half-valid manifest. Keys that this page does not name are ignored within one
`schema_version`; a change of meaning raises the version, and a newer version is refused.

Letters: L layers, G KV heads, D head dim, W window, C chunk (most tokens of one step), S slots of a ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from runtime.errors import BundleError
from runtime.json_files import brief, parse_json_object
from runtime.manifest_quantization import QUANTIZED_KINDS, QuantizationInfo, parse_quantization
from runtime.manifest_section import Section
from runtime.rolling_kv import KV_DTYPES, required_capacity

SCHEMA_VERSION = 3
STORED, FP32 = "stored", "fp32"
WEIGHT_KINDS = (STORED, FP32, *QUANTIZED_KINDS)
COPIED, LINKED, FOLDER = "copied", "linked", "folder"
PLACEMENTS = (COPIED, LINKED, FOLDER)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a session must know of the model: sizes, and the ids that begin and end a text."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """The ONNX file and the names of its inputs and outputs, apart from the KV buffers."""

    file: str
    opset: int
    input_ids: str
    start_positions: str
    token_counts: str
    logit_positions: str
    logits: str


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's ring: `window` W (None = full attention), `capacity` S slots, and the four names in the graph."""

    window: int | None
    capacity: int
    past_key: str
    past_value: str
    present_key: str
    present_value: str


@dataclass(frozen=True, slots=True)
class KVInfo:
    """The KV buffers: `chunk` is the most tokens of one step, `context` the capacity of full-attention layers.

    position_limit: positions from here on must not be run, or None (see `ModelConfig.position_limit`).
    """

    dtype: str
    chunk: int
    max_batch: int
    context: int | None
    position_limit: int | None
    layers: tuple[LayerKV, ...]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Size in bytes of a file, and its SHA-256 or its block hash (`runtime.hashing`) in lower-case hex, or neither."""

    bytes: int
    sha256: str | None
    blocks_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """Where the weights lie and as what.

    kind: "stored", as the checkpoint has them, "fp32", converted, or "int8" or "int4", quantised.
    arithmetic: the type that is computed in.
    placement: "copied" into the bundle, checkpoint files "linked" into it, or left in a "folder".
    folder: absolute path of that folder, None for the other placements.
    types: how many tensors the graph reads by stored type, in the spelling of safetensors.
    folded_bytes: what the weights take that an engine makes out of stored ones (cast, stacked or reordered), if it
        makes them when it loads and keeps them.
    folding_bytes: what all steps on the way there give out, which an engine may hold at once while it loads.
    made_bytes, making_bytes: the same for an engine with native kernels, which read the stored types as they are, so
        that only stacked and reordered weights are made.
    files: the files that hold weights, by name.
    quantization: how weights are quantised; None where none are.
    """

    kind: str
    arithmetic: str
    placement: str
    folder: str | None
    types: Mapping[str, int]
    folded_bytes: int
    folding_bytes: int
    made_bytes: int
    making_bytes: int
    files: Mapping[str, FileInfo]
    quantization: QuantizationInfo | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole manifest. `provenance` is kept as it stands; the fusion report is not the runtime's business.

    files: all files of the bundle but the manifest, those that hold weights, and what lies in the folders of engines.
    engines: what was built from the bundle, by the name of its folder: size and hash of its engine.json
    (`runtime.engine_info`). An export leaves it out; nothing of it is needed to run the graph.
    """

    schema_version: int
    cierzo_version: str
    model: ModelInfo
    graph: GraphInfo
    kv: KVInfo
    weights: WeightsInfo
    tokenizer: tuple[str, ...]
    files: Mapping[str, FileInfo]
    provenance: Mapping[str, Any]
    engines: Mapping[str, FileInfo] = field(default_factory=lambda: MappingProxyType({}))


def parse_manifest(content: bytes) -> Manifest:
    """Parse the content of a `manifest.json`.

    Raises BundleError for content that is no JSON object, for another schema version, for missing or mistyped keys,
    for unknown kinds, and for layers that contradict the chunk, the context or the number of layers.
    """
    document = parse_json_object(
        content, lambda cause: BundleError(f"The manifest is not readable JSON ({cause}). Export the checkpoint again.")
    )
    root = Section(document, "")
    version = root.integer("schema_version", minimum=1)
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"The bundle was written with manifest schema {version}, but this Cierzo reads schema {SCHEMA_VERSION}. "
            "Upgrade Cierzo, or export the checkpoint again with this version."
        )
    if version < SCHEMA_VERSION:
        raise BundleError(
            f"The bundle was written with manifest schema {version}, whose graphs have other inputs; this Cierzo reads "
            f"schema {SCHEMA_VERSION}. Export the checkpoint again, which takes seconds and copies no weights."
        )
    manifest = Manifest(
        schema_version=version,
        cierzo_version=root.string("cierzo_version"),
        model=_model(root.section("model")),
        graph=_graph(root.section("graph")),
        kv=_kv(root.section("kv")),
        weights=_weights(root.section("weights")),
        tokenizer=tuple(root.strings("tokenizer")),
        files=_own_files(root.section("files")),
        provenance=MappingProxyType(dict(root.section("provenance").data)),
        engines=_own_files(root.section("engines")) if "engines" in document else MappingProxyType({}),
    )
    _check_consistency(manifest)
    return manifest


def _model(section: Section) -> ModelInfo:
    sizes = {
        name: section.integer(name, minimum=1)
        for name in (
            "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
            "max_position_embeddings", "parameters",
        )
    }  # fmt: skip
    eos_token_ids = section.items("eos_token_ids")
    if not all(type(token_id) is int and 0 <= token_id < sizes["vocab_size"] for token_id in eos_token_ids):
        raise BundleError("The manifest's `model.eos_token_ids` must hold ids inside the vocabulary. Export again.")
    bos_token_id = section.optional_integer("bos_token_id", minimum=0)
    if bos_token_id is not None and bos_token_id >= sizes["vocab_size"]:
        raise BundleError(
            f"The manifest's `model.bos_token_id` {bos_token_id} is outside the vocabulary. Export again."
        )
    return ModelInfo(
        architecture=section.string("architecture"),
        bos_token_id=bos_token_id,
        eos_token_ids=tuple(eos_token_ids),
        **sizes,
    )


def _graph(section: Section) -> GraphInfo:
    names = ("file", "input_ids", "start_positions", "token_counts", "logit_positions", "logits")
    return GraphInfo(opset=section.integer("opset", minimum=1), **{name: section.string(name) for name in names})


def _kv(section: Section) -> KVInfo:
    layers = []
    for layer in section.sections("layers"):
        layers.append(
            LayerKV(
                window=layer.optional_integer("window", minimum=1),
                capacity=layer.integer("capacity", minimum=1),
                past_key=layer.string("past_key"),
                past_value=layer.string("past_value"),
                present_key=layer.string("present_key"),
                present_value=layer.string("present_value"),
            )
        )
    return KVInfo(
        dtype=section.one_of("dtype", tuple(KV_DTYPES)),
        chunk=section.integer("chunk", minimum=1),
        max_batch=section.integer("max_batch", minimum=1),
        context=section.optional_integer("context", minimum=1),
        position_limit=section.optional_integer("position_limit", minimum=1),
        layers=tuple(layers),
    )


def _weights(section: Section) -> WeightsInfo:
    types = section.section("types")
    kind, placement = section.one_of("kind", WEIGHT_KINDS), section.one_of("placement", PLACEMENTS)
    return WeightsInfo(
        kind=kind,
        arithmetic=section.string("arithmetic"),
        placement=placement,
        folder=section.optional_string("folder"),
        types=MappingProxyType({name: types.integer(name, minimum=1) for name in types.data}),
        folded_bytes=section.integer("folded_bytes", minimum=0),
        folding_bytes=section.integer("folding_bytes", minimum=0),
        made_bytes=section.integer("made_bytes", minimum=0),
        making_bytes=section.integer("making_bytes", minimum=0),
        files=_weight_files(section.section("files")),
        quantization=parse_quantization(section, kind, placement),
    )


def _own_files(section: Section) -> Mapping[str, FileInfo]:
    files = {}
    for name in section.data:
        entry = section.section(name)
        files[name] = FileInfo(bytes=entry.integer("bytes", minimum=0), sha256=entry.hash("sha256"))
    return MappingProxyType(files)


def _weight_files(section: Section) -> Mapping[str, FileInfo]:
    files = {}
    for name in section.data:
        entry = section.section(name)
        files[name] = FileInfo(
            bytes=entry.integer("bytes", minimum=0),
            sha256=entry.optional_hash("sha256"),
            blocks_sha256=entry.optional_hash("blocks_sha256"),
        )
    return MappingProxyType(files)


def _check_consistency(manifest: Manifest) -> None:
    model, kv = manifest.model, manifest.kv
    if len(kv.layers) != model.num_layers:
        raise BundleError(
            f"The manifest describes {len(kv.layers)} KV layers for a model of {model.num_layers} layers. "
            "Export the checkpoint again."
        )
    for index, layer in enumerate(kv.layers):
        if layer.window is None and layer.capacity != kv.context:
            raise BundleError(
                f"Layer {index} has full attention, so its buffer must have `kv.context` = {kv.context} slots, "
                f"but the manifest gives it {layer.capacity}. Export the checkpoint again."
            )
        if layer.window is not None and layer.capacity < required_capacity(layer.window, kv.chunk):
            raise BundleError(
                f"Layer {index} has {layer.capacity} slots, but a window of {layer.window} with chunks of {kv.chunk} "
                f"tokens needs {required_capacity(layer.window, kv.chunk)}: tokens would be overwritten while they are "
                "still seen. Export the checkpoint again."
            )
    if kv.context is not None and kv.context < kv.chunk:
        raise BundleError(
            f"The manifest's chunk of {kv.chunk} tokens is larger than its context of {kv.context}. Export again."
        )
    if (manifest.weights.folder is not None) != (manifest.weights.placement == FOLDER):
        raise BundleError(
            f"The manifest's `weights.folder` is {brief(manifest.weights.folder)}, which does not go with the "
            f"placement {manifest.weights.placement!r}. Export the checkpoint again."
        )
    for name in manifest.files.keys() & manifest.weights.files.keys():
        raise BundleError(
            f"The manifest lists {brief(name)} under `files` and under `weights.files`, so it does not say "
            "which of two folders has it. Export the checkpoint again."
        )
    for name in manifest.engines:
        if "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise BundleError(
                f"The manifest lists the engine {brief(name)}, which names no folder. Export the checkpoint again."
            )
    for name in (manifest.graph.file, *manifest.tokenizer):
        if name not in manifest.files:
            raise BundleError(
                f"The manifest refers to {brief(name)}, but does not list its size under `files`. "
                "Export the checkpoint again."
            )
