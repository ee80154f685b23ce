"""Which checkpoint tensors make up each parameter of the reference model, and nothing left over.

The Hugging Face layout names dense models in one way. Mixtral's experts come in two: one tensor per expert
(`block_sparse_moe.experts.{e}.w1`, all published checkpoints), or stacked with gate and up in one
(`mlp.experts.gate_up_proj` [E, 2I, Hid], what transformers 5 holds in memory and saves on request).

Symbols: V vocabulary, Hid hidden size, I intermediate size, H heads, G KV heads, D head dim, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reference.checkpoint import Checkpoint, some
from reference.config import ModelConfig
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch

EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_COMPARED_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where one parameter of shape `shape` comes from.

    pieces: names of checkpoint tensors, each of shape `piece_shape`.
    stacked: the pieces are stacked along a new leading axis, in order (an expert each); otherwise there is one piece.
    rows: when given, this parameter is that half-open range of the piece's last axis but one; others have the rest.
    """

    parameter: str
    shape: tuple[int, ...]
    pieces: tuple[str, ...]
    piece_shape: tuple[int, ...]
    stacked: bool = False
    rows: tuple[int, int] | None = None


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the reference model, in the model's order; tied ones once."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.q_proj.weight"] = (query_rows, hidden)
        shapes[prefix + "self_attn.k_proj.weight"] = (kv_rows, hidden)
        shapes[prefix + "self_attn.v_proj.weight"] = (kv_rows, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, query_rows)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config.moe is None:
            shapes[prefix + "mlp.gate_proj.weight"] = (intermediate, hidden)
            shapes[prefix + "mlp.up_proj.weight"] = (intermediate, hidden)
            shapes[prefix + "mlp.down_proj.weight"] = (hidden, intermediate)
        else:
            experts = config.moe.num_experts
            shapes[prefix + "moe.router.weight"] = (experts, hidden)
            shapes[prefix + "moe.gate_proj"] = (experts, intermediate, hidden)
            shapes[prefix + "moe.up_proj"] = (experts, intermediate, hidden)
            shapes[prefix + "moe.down_proj"] = (experts, hidden, intermediate)
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def weight_map(config: ModelConfig, tensor_names: Collection[str]) -> dict[str, WeightSource]:
    """The source of every parameter, in the order of `parameter_shapes`.

    tensor_names: names in the checkpoint, which decide between the layouts; whether all are there is `bind`'s matter.
    """
    names = frozenset(tensor_names)
    fused_experts = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    sources: dict[str, WeightSource] = {}
    for parameter, shape in parameter_shapes(config).items():
        if ".moe." in parameter:
            sources[parameter] = _expert_source(parameter, shape, fused_experts)
            continue
        stored = LM_HEAD if parameter == LM_HEAD else f"model.{parameter}"
        if parameter == EMBEDDING and config.tie_word_embeddings and stored not in names and LM_HEAD in names:
            stored = LM_HEAD  # a file that stores shared memory once may keep either of its two names
        sources[parameter] = WeightSource(parameter, shape, (stored,), shape)
    return sources


def _expert_source(parameter: str, shape: tuple[int, ...], fused: bool) -> WeightSource:
    """The source of `layers.{i}.moe.*`, whose shape begins with the number of experts."""
    layer, _, part = parameter.partition(".moe.")
    block = f"model.{layer}.mlp" if fused else f"model.{layer}.block_sparse_moe"
    if part == "router.weight":
        return WeightSource(parameter, shape, (f"{block}.gate.weight",), shape)
    if not fused:
        matrix = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part]
        pieces = tuple(f"{block}.experts.{expert}.{matrix}.weight" for expert in range(shape[0]))
        return WeightSource(parameter, shape, pieces, shape[1:], stacked=True)
    if part == "down_proj":
        return WeightSource(parameter, shape, (f"{block}.experts.down_proj",), shape)
    experts, size, hidden = shape
    rows = (0, size) if part == "gate_proj" else (size, 2 * size)
    return WeightSource(parameter, shape, (f"{block}.experts.gate_up_proj",), (experts, 2 * size, hidden), rows=rows)


def bind(checkpoint: Checkpoint) -> dict[str, WeightSource]:
    """`weight_map` of a checkpoint, after checking that its tensors are exactly the ones that the model takes.

    Raises CheckpointError when tensors are missing, misshapen or of a type that is no plain floating point, when some
    are neither consumed nor declared unused, and when a model with tied embeddings stores two different ones.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    sources = weight_map(config, tensors)
    shapes = {piece: source.piece_shape for source in sources.values() for piece in source.pieces}
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {_tensors(missing)} that {config.architecture} with {config.num_layers} layers "
            "takes. Check that config.json belongs to these weights and that all files were downloaded."
        )
    surplus = [name for name in tensors if name not in shapes and unused_reason(config, name) is None]
    if surplus:
        raise CheckpointError(
            f"{checkpoint.path} holds {_tensors(surplus)} that {config.architecture} with {config.num_layers} layers "
            "has no use for, so it was made for another model. Check that config.json belongs to these weights."
        )
    misshapen = [
        f"{name} is {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if tensors[name].shape != shape
    ]
    if misshapen:
        raise CheckpointError(
            f"{checkpoint.path} has {len(misshapen)} of another shape than config.json says: {some(misshapen, 3)}. "
            "Check that config.json belongs to these weights."
        )
    packed = [f"{name} ({tensors[name].dtype})" for name in shapes if tensors[name].dtype not in WEIGHT_DTYPES]
    if packed:
        raise CheckpointError(
            f"{checkpoint.path} holds {_tensors(packed)} of a type that Cierzo does not compute with. "
            "Use the unquantised checkpoint in float32, float16 or bfloat16."
        )
    _check_tied_head(checkpoint, sources)
    return sources


def unused_reason(config: ModelConfig, name: str) -> str | None:
    """Why the checkpoint tensor `name` may be left unread, or None when it may not."""
    if _ROTARY_BUFFER.fullmatch(name):
        return "RoPE's frequencies follow from config.json; old versions of transformers stored them as well"
    if name == LM_HEAD and config.tie_word_embeddings:
        return "the output projection is tied to the embedding and holds the same values"
    return None


def load_parameter(checkpoint: Checkpoint, source: WeightSource, dtype: torch.dtype) -> torch.Tensor:
    """One parameter of shape `source.shape` in `dtype`, contiguous, cast piece by piece.

    With one whole piece already in `dtype` this is the memory-mapped tensor itself (see `Checkpoint.read`). Raises
    CheckpointError when a value does not fit into `dtype` (above 65504 for float16) and would become infinite.
    """
    import torch

    if not source.stacked:
        return _cast(checkpoint, source, source.pieces[0], dtype).contiguous()
    stack = torch.empty(source.shape, dtype=dtype)
    for index, piece in enumerate(source.pieces):
        stack[index] = _cast(checkpoint, source, piece, dtype)
    return stack


def _cast(checkpoint: Checkpoint, source: WeightSource, piece: str, dtype: torch.dtype) -> torch.Tensor:
    import torch

    stored = checkpoint.read(piece)
    if source.rows is not None:
        stored = stored[..., source.rows[0] : source.rows[1], :]
    cast = stored.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(stored.dtype).max and not bool(cast.isfinite().all()):
        largest = float(stored.abs().max())
        raise CheckpointError(
            f"{checkpoint.path} holds {piece} with values up to {largest:g}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:g}. Use float32 or bfloat16 for these weights."
        )
    return cast


def _check_tied_head(checkpoint: Checkpoint, sources: dict[str, WeightSource]) -> None:
    """transformers does not tie when both matrices are stored and differ, so config.json and weights then disagree."""
    stored = sources[EMBEDDING].pieces[0]
    if not checkpoint.config.tie_word_embeddings or LM_HEAD not in checkpoint.tensors or stored == LM_HEAD:
        return
    head, embedding = checkpoint.read_bytes(LM_HEAD), checkpoint.read_bytes(stored)
    same_layout = checkpoint.tensors[LM_HEAD].dtype == checkpoint.tensors[stored].dtype and len(head) == len(embedding)
    # Slices become bytes because comparing memoryviews goes element by element.
    if not same_layout or any(
        bytes(head[start : start + _COMPARED_AT_ONCE]) != bytes(embedding[start : start + _COMPARED_AT_ONCE])
        for start in range(0, len(head), _COMPARED_AT_ONCE)
    ):
        raise CheckpointError(
            f"{checkpoint.path} says tie_word_embeddings, but its {LM_HEAD} differs from {stored}. "
            "Set tie_word_embeddings to false if the stored output projection is meant, or delete it."
        )


def _tensors(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''} ({some(names)})"
