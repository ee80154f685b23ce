"""The manifest of a bundle: the only contract between building and running.

`parse_manifest` turns the JSON text of `manifest.json` into frozen dataclasses and refuses whatever contradicts itself,
so that no later stage meets a half-valid manifest. Keys that this page does not name are ignored within one
`schema_version`; a change of meaning raises the version, and a newer version is refused.

Letters: L layers, G KV heads, D head dim, W window, C chunk (most tokens of one step), S slots of a ring.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from runtime.errors import BundleError
from runtime.rolling_kv import KV_DTYPES, required_capacity

SCHEMA_VERSION = 1
WEIGHT_DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")

_T = TypeVar("_T")


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
    """The KV buffers: `chunk` is the most tokens of one step, `context` the capacity of full-attention layers."""

    dtype: str
    chunk: int
    max_batch: int
    context: int | None
    layers: tuple[LayerKV, ...]


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """The file that holds the weights, and how they are stored in it."""

    file: str
    dtype: str


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Size in bytes and SHA-256 (lower-case hex) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole manifest. `provenance` is kept as it stands; the fusion report is not the runtime's business."""

    schema_version: int
    cierzo_version: str
    model: ModelInfo
    graph: GraphInfo
    kv: KVInfo
    weights: WeightsInfo
    tokenizer: tuple[str, ...]
    files: Mapping[str, FileInfo]
    provenance: Mapping[str, Any]


def parse_manifest(text: str) -> Manifest:
    """Parse the text of a `manifest.json`.

    Raises BundleError for text that is no JSON object, for another schema version, for missing or mistyped keys, for
    unknown dtypes, and for layers that contradict the chunk, the context or the number of layers.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"The manifest is not valid JSON ({error}). Export the checkpoint again.") from error
    if not isinstance(document, dict):
        raise BundleError("The manifest is not a JSON object. Export the checkpoint again.")
    root = _Section(document, "")
    version = root.integer("schema_version", minimum=1)
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"The bundle was written with manifest schema {version}, but this Cierzo reads schemas up to "
            f"{SCHEMA_VERSION}. Upgrade Cierzo, or export the checkpoint again with this version."
        )
    manifest = Manifest(
        schema_version=version,
        cierzo_version=root.string("cierzo_version"),
        model=_model(root.section("model")),
        graph=_graph(root.section("graph")),
        kv=_kv(root.section("kv")),
        weights=_weights(root.section("weights")),
        tokenizer=tuple(root.strings("tokenizer")),
        files=MappingProxyType(_files(root.section("files"))),
        provenance=MappingProxyType(dict(root.section("provenance").data)),
    )
    _check_consistency(manifest)
    return manifest


class _Section:
    """A JSON object with typed access: a wrong or missing value raises a BundleError naming the path to it."""

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self.data = data
        self.path = path

    def _typed(self, key: str, kind: type[_T], words: str) -> _T:
        value = self.data.get(key)
        # bool is an int to Python; a manifest that says `true` for a size is damaged all the same.
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "missing" if key not in self.data else f"{value!r}"
            raise BundleError(
                f"The manifest's `{self.path}{key}` must be {words}, but it is {found}. Export the checkpoint again."
            )
        return value

    def integer(self, key: str, *, minimum: int) -> int:
        value = self._typed(key, int, "an integer")
        if value < minimum:
            raise BundleError(
                f"The manifest's `{self.path}{key}` is {value}, but it cannot be below {minimum}. "
                "Export the checkpoint again."
            )
        return value

    def optional_integer(self, key: str, *, minimum: int) -> int | None:
        if key in self.data and self.data[key] is None:
            return None
        return self.integer(key, minimum=minimum)

    def string(self, key: str) -> str:
        return self._typed(key, str, "a string")

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        value = self.string(key)
        if value not in known:
            raise BundleError(
                f"The manifest's `{self.path}{key}` is {value!r}, but this Cierzo knows only {', '.join(known)}. "
                "Upgrade Cierzo, or export the checkpoint again with one of these."
            )
        return value

    def items(self, key: str) -> list[Any]:
        return self._typed(key, list, "a list")

    def strings(self, key: str) -> list[str]:
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise BundleError(f"The manifest's `{self.path}{key}` must hold strings only. Export the checkpoint again.")
        return values

    def section(self, key: str) -> _Section:
        return _Section(self._typed(key, dict, "an object"), f"{self.path}{key}.")


def _model(section: _Section) -> ModelInfo:
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


def _graph(section: _Section) -> GraphInfo:
    names = ("file", "input_ids", "start_positions", "token_counts", "logits")
    return GraphInfo(opset=section.integer("opset", minimum=1), **{name: section.string(name) for name in names})


def _kv(section: _Section) -> KVInfo:
    layers = []
    for index, item in enumerate(section.items("layers")):
        if not isinstance(item, dict):
            raise BundleError(f"The manifest's `kv.layers[{index}]` must be an object. Export the checkpoint again.")
        layer = _Section(item, f"kv.layers[{index}].")
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
        layers=tuple(layers),
    )


def _weights(section: _Section) -> WeightsInfo:
    return WeightsInfo(file=section.string("file"), dtype=section.one_of("dtype", WEIGHT_DTYPES))


def _files(section: _Section) -> dict[str, FileInfo]:
    files = {}
    for name in section.data:
        entry = section.section(name)
        files[name] = FileInfo(bytes=entry.integer("bytes", minimum=0), sha256=entry.string("sha256"))
    return files


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
    for name in (manifest.graph.file, manifest.weights.file, *manifest.tokenizer):
        if name not in manifest.files:
            raise BundleError(
                f"The manifest refers to {name}, but does not list its size under `files`. Export the checkpoint again."
            )
