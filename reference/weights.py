"""Holds a checkpoint's tensors against the model: every parameter has its source, and no tensor is left over."""

from __future__ import annotations

import re
from collections.abc import Collection

from reference.checkpoint import HUGGING_FACE, Checkpoint, some
from reference.config import ModelConfig
from reference.native_weights import NATIVE_LM_HEAD, native_unused_reason
from reference.packed_binding import Source, is_zero_bias, looks_packed, matrices_of, sources_of
from reference.packed_layouts import Expected
from reference.packed_source import PackedSource, load_parameter, read_packed
from reference.parameters import EMBEDDING, LM_HEAD, parameter_shapes
from reference.weight_maps import HEADS, weight_map
from reference.weight_source import Piece, WeightSource
from runtime.errors import CheckpointError

__all__ = [
    "EMBEDDING",
    "LM_HEAD",
    "PackedSource",
    "Piece",
    "Source",
    "WEIGHT_DTYPES",
    "WeightSource",
    "bind",
    "load_parameter",
    "parameter_shapes",
    "read_packed",
    "reason_unused",
    "unused_reason",
    "weight_map",
]

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")
_ROTARY_BUFFER = re.compile(
    r"((model|model\.language_model|language_model\.model)\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..+")
_COMPARED_AT_ONCE = 1 << 22


def bind(checkpoint: Checkpoint) -> dict[str, Source]:
    """The source of every parameter, after checking that the tensors are exactly the ones that the model takes.

    Raises CheckpointError when tensors are missing, misshapen or of a type that is no plain floating point, when some
    are neither consumed nor declared unused, when a model with tied embeddings stores two different ones, and when a
    quantised checkpoint is packed otherwise than its config says, or than blocks can represent exactly.
    """
    config, tensors, file = checkpoint.config, checkpoint.tensors, checkpoint.config_file.name
    sources = sources_of(checkpoint)
    expected = {
        piece.tensor: Expected(piece.tensor_shape, WEIGHT_DTYPES)
        for source in sources.values()
        if isinstance(source, WeightSource)
        for piece in source.pieces
    }
    matrices = matrices_of(sources)
    for matrix in matrices.values():
        expected |= matrix.expected(tensors)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {_tensors(missing)} that {config.architecture} with {config.num_layers} layers "
            f"takes. Check that {file} belongs to these weights and that all files were downloaded."
            f"{looks_packed(checkpoint)}"
        )
    surplus = [name for name in tensors if name not in expected and reason_unused(checkpoint, name) is None]
    if surplus:
        raise CheckpointError(
            f"{checkpoint.path} holds {_tensors(surplus)} that {config.architecture} with {config.num_layers} layers "
            f"has no use for, so it was made for another model. Check that {file} belongs to these weights."
        )
    misshapen = [
        f"{name} is {list(tensors[name].shape)} instead of {list(one.shape)}"
        for name, one in expected.items()
        if tensors[name].shape != one.shape
    ]
    if misshapen:
        raise CheckpointError(
            f"{checkpoint.path} has {len(misshapen)} of another shape than {file} says: {some(misshapen, 3)}. "
            f"Check that {file} belongs to these weights."
        )
    odd = [f"{name} ({tensors[name].dtype})" for name, one in expected.items() if tensors[name].dtype not in one.dtypes]
    if odd:
        raise CheckpointError(
            f"{checkpoint.path} holds {_tensors(odd)} of a type that Cierzo does not compute with. "
            "Use the unquantised checkpoint in float32, float16 or bfloat16."
        )
    for matrix in matrices.values():
        matrix.check(checkpoint)
    _check_tied_head(checkpoint, sources)
    return sources


def unused_reason(config: ModelConfig, name: str, *, layout: str = HUGGING_FACE, text_only: bool = False) -> str | None:
    """Why the checkpoint tensor `name` may be left unread, or None when it may not.

    layout, text_only: see `reference.checkpoint.Checkpoint`.
    """
    if layout != HUGGING_FACE:
        return native_unused_reason(config, name, text_only=text_only)
    if text_only and _IMAGES.fullmatch(name):
        return "it reads images, and only the language model was asked for"
    if _ROTARY_BUFFER.fullmatch(name):
        return "RoPE's frequencies follow from config.json; old versions of transformers stored them as well"
    if name in HEADS and config.tie_word_embeddings:
        return "the output projection is tied to the embedding and holds the same values"
    return None


def reason_unused(checkpoint: Checkpoint, name: str) -> str | None:
    """`unused_reason` of a tensor of an open checkpoint, which may also be a bias that adds nothing."""
    if is_zero_bias(checkpoint, name):
        return "it is a bias of zeros, which AutoGPTQ gave to every layer"
    return unused_reason(checkpoint.config, name, layout=checkpoint.layout, text_only=checkpoint.text_only)


def _check_tied_head(checkpoint: Checkpoint, sources: dict[str, Source]) -> None:
    """transformers does not tie when both matrices are stored and differ, so config.json and weights then disagree."""
    embedding = sources[EMBEDDING]
    assert isinstance(embedding, WeightSource)
    stored = embedding.pieces[0].tensor
    heads = HEADS if checkpoint.layout == HUGGING_FACE else (NATIVE_LM_HEAD,)
    for name in heads if checkpoint.config.tie_word_embeddings else ():
        if name in checkpoint.tensors and name != stored:
            _check_same(checkpoint, name, stored)


def _check_same(checkpoint: Checkpoint, name: str, stored: str) -> None:
    head, embedding = checkpoint.read_bytes(name), checkpoint.read_bytes(stored)
    same_layout = checkpoint.tensors[name].dtype == checkpoint.tensors[stored].dtype and len(head) == len(embedding)
    # Slices become bytes because comparing memoryviews goes element by element.
    if not same_layout or any(
        bytes(head[start : start + _COMPARED_AT_ONCE]) != bytes(embedding[start : start + _COMPARED_AT_ONCE])
        for start in range(0, len(head), _COMPARED_AT_ONCE)
    ):
        key = "tie_word_embeddings" if checkpoint.layout == HUGGING_FACE else "tied_embeddings"
        raise CheckpointError(
            f"{checkpoint.path} says {key}, but its {name} differs from {stored}. "
            f"Set {key} to false if the stored output projection is meant, or delete it."
        )


def _tensors(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''} ({some(names)})"
