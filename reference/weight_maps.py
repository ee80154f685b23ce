"""Which checkpoint tensors make up each parameter of the reference model, by layout.

The Hugging Face layout names most tensors as `transformers` names the parameters of its classes, which are ours with a
prefix. What differs is a weight map of its own, named by the row of `reference.architectures`:

    mixtral      one tensor per expert (`block_sparse_moe.experts.{e}.w1`, all published checkpoints), or stacked with
                 gate and up in one (`mlp.experts.gate_up_proj` [E, 2I, C], what transformers 5 holds in memory and
                 saves on request)
    qwen3_moe    the same two, as `mlp.experts.{e}.gate_proj` and `mlp.experts.gate_up_proj`
    phi3         queries, keys and values in one tensor (`self_attn.qkv_proj`), and gate and up in one

Symbols: C hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from reference.architectures import ARCHITECTURES
from reference.checkpoint import HUGGING_FACE
from reference.config import ModelConfig
from reference.native_weights import native_source
from reference.parameters import EMBEDDING, FINAL_NORM, LM_HEAD, parameter_shapes
from reference.weight_source import WeightSource, rows_of, stacked, whole

_BEHIND_VISION = ("model.language_model.", "language_model.model.")
"""What stands for "model." where the model has a vision tower beside it: in files of the new and old generation."""

HEADS = (LM_HEAD, f"language_model.{LM_HEAD}")
"""The names that the output projection has in files."""


@dataclass(frozen=True, slots=True)
class StoredNames:
    """How one checkpoint in the Hugging Face layout spells its names.

    all: its tensors. prefix: before the names of all parameters but the head. head: the name of that.
    """

    all: frozenset[str]
    prefix: str
    head: str


SourceOf = Callable[[ModelConfig, StoredNames, str, tuple[int, ...]], WeightSource]
"""(config, names, parameter, its shape) to its source."""


def weight_map(
    config: ModelConfig, tensor_names: Collection[str], layout: str = HUGGING_FACE
) -> dict[str, WeightSource]:
    """The source of every parameter, in the order of `parameter_shapes`.

    tensor_names: names in the checkpoint, which decide between spellings of one layout; whether all are there is
        `reference.weights.bind`'s matter.
    layout: one of `reference.checkpoint.LAYOUTS`.
    """
    shapes = parameter_shapes(config)
    if layout != HUGGING_FACE:
        names = frozenset(tensor_names)
        return {parameter: native_source(config, names, parameter, shape) for parameter, shape in shapes.items()}
    stored, source = stored_names(tensor_names), WEIGHT_MAPS[ARCHITECTURES[config.architecture].weight_map]
    return {parameter: source(config, stored, parameter, shape) for parameter, shape in shapes.items()}


def stored_names(tensor_names: Collection[str]) -> StoredNames:
    """The spelling of a checkpoint in the Hugging Face layout, by the names of its tensors."""
    names = frozenset(tensor_names)
    bare = FINAL_NORM in names  # a model that was saved without its head, as embedding models are
    prefix = next((p for p in _BEHIND_VISION if any(name.startswith(p) for name in names)), "" if bare else "model.")
    return StoredNames(names, prefix, next((head for head in HEADS if head in names), LM_HEAD))


def _plain(config: ModelConfig, names: StoredNames, parameter: str, shape: tuple[int, ...]) -> WeightSource:
    stored = names.head if parameter == LM_HEAD else names.prefix + parameter
    if parameter == EMBEDDING and config.tie_word_embeddings and stored not in names.all and names.head in names.all:
        stored = names.head  # a file that stores shared memory once may keep either of its two names
    return whole(parameter, shape, stored)


def _fused_projections(config: ModelConfig, names: StoredNames, parameter: str, shape: tuple[int, ...]) -> WeightSource:
    """Phi-3: rows of queries, keys and values lie one after the other, and so do those of gate and up."""
    module, _, kind = parameter.rpartition(".")
    owner, _, projection = module.rpartition(".")
    query, kv, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, shape[0]
    first = {"q_proj": 0, "k_proj": query, "v_proj": query + kv, "gate_proj": 0, "up_proj": inner}
    if projection not in first:
        return _plain(config, names, parameter, shape)
    fused, rows = ("gate_up_proj", 2 * inner) if owner.endswith(".mlp") else ("qkv_proj", query + 2 * kv)
    return rows_of(parameter, shape, f"{names.prefix}{owner}.{fused}.{kind}", rows, first[projection])


def _experts(block: str, matrices: Mapping[str, str]) -> SourceOf:
    """Experts that lie as a tensor each in `block` under the names `matrices`, or stacked in `mlp`."""

    def source(config: ModelConfig, names: StoredNames, parameter: str, shape: tuple[int, ...]) -> WeightSource:
        layer, inside, part = parameter.partition(".moe.")
        if not inside:
            return _plain(config, names, parameter, shape)
        at = f"{names.prefix}{layer}."
        if f"{at}mlp.experts.gate_up_proj" not in names.all:
            if part == "router.weight":
                return whole(parameter, shape, f"{at}{block}.gate.weight")
            return stacked(
                parameter, shape, [f"{at}{block}.experts.{e}.{matrices[part]}.weight" for e in range(shape[0])]
            )
        if part == "router.weight":
            return whole(parameter, shape, f"{at}mlp.gate.weight")
        if part == "down_proj":
            return whole(parameter, shape, f"{at}mlp.experts.down_proj")
        first = 0 if part == "gate_proj" else shape[1]
        return rows_of(parameter, shape, f"{at}mlp.experts.gate_up_proj", 2 * shape[1], first)

    return source


WEIGHT_MAPS: Mapping[str, SourceOf] = {
    "plain": _plain,
    "phi3": _fused_projections,
    "mixtral": _experts("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "qwen3_moe": _experts("mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")}),
}
