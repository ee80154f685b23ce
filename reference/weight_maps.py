"""Which checkpoint tensors make up each parameter of the reference model, by layout.

The Hugging Face layout names dense models in one way. Mixtral's experts come in two: one tensor per expert
(`block_sparse_moe.experts.{e}.w1`, all published checkpoints), or stacked with gate and up in one
(`mlp.experts.gate_up_proj` [E, 2I, C], what transformers 5 holds in memory and saves on request).

Symbols: C hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Collection

from reference.checkpoint import HUGGING_FACE
from reference.config import ModelConfig
from reference.native_weights import native_source
from reference.parameters import EMBEDDING, LM_HEAD, parameter_shapes
from reference.weight_source import WeightSource, rows_of, stacked, whole


def weight_map(
    config: ModelConfig, tensor_names: Collection[str], layout: str = HUGGING_FACE
) -> dict[str, WeightSource]:
    """The source of every parameter, in the order of `parameter_shapes`.

    tensor_names: names in the checkpoint, which decide between spellings of one layout; whether all are there is
        `reference.weights.bind`'s matter.
    layout: one of `reference.checkpoint.LAYOUTS`.
    """
    names = frozenset(tensor_names)
    source = _hugging_face_source if layout == HUGGING_FACE else native_source
    return {parameter: source(config, names, parameter, shape) for parameter, shape in parameter_shapes(config).items()}


def _hugging_face_source(
    config: ModelConfig, names: frozenset[str], parameter: str, shape: tuple[int, ...]
) -> WeightSource:
    if ".moe." in parameter:
        return _expert_source(names, parameter, shape)
    stored = LM_HEAD if parameter == LM_HEAD else f"model.{parameter}"
    if parameter == EMBEDDING and config.tie_word_embeddings and stored not in names and LM_HEAD in names:
        stored = LM_HEAD  # a file that stores shared memory once may keep either of its two names
    return whole(parameter, shape, stored)


def _expert_source(names: frozenset[str], parameter: str, shape: tuple[int, ...]) -> WeightSource:
    """The source of `layers.{i}.moe.*`, whose shape begins with the number of experts."""
    layer, _, part = parameter.partition(".moe.")
    fused = f"model.{layer}.mlp.experts.gate_up_proj" in names
    block = f"model.{layer}.mlp" if fused else f"model.{layer}.block_sparse_moe"
    if part == "router.weight":
        return whole(parameter, shape, f"{block}.gate.weight")
    if not fused:
        matrix = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part]
        return stacked(parameter, shape, [f"{block}.experts.{expert}.{matrix}.weight" for expert in range(shape[0])])
    if part == "down_proj":
        return whole(parameter, shape, f"{block}.experts.down_proj")
    size = shape[1]
    return rows_of(parameter, shape, f"{block}.experts.gate_up_proj", 2 * size, 0 if part == "gate_proj" else size)
