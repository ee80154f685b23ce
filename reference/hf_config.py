"""A Hugging Face config.json as a ModelConfig, read by the rows of `reference.architectures`.

Both generations of the file are understood: `rope_theta`, `rope_scaling` and `torch_dtype` at the top level (published
checkpoints), and `rope_parameters` and `dtype` (written by transformers 5). A key that is absent gets the default of
the config class in `transformers`, which is what every other reader of the file computes with. Two of those defaults
are easily missed: Mistral's sliding_window is 4096 when the key is absent and none when it is null; Mixtral's is none
in both cases, and its rope_theta is 1e6 instead of 1e4.

A model with a vision tower holds the config of its language model inside, under `text_config`. That one is read alone
when the caller asks for the text side only, and the whole is refused otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from reference.architectures import ARCHITECTURES, WRAPPERS, Architecture, Experts, Wrapper
from reference.config import DTYPES, MOST, SUPPORTED_ACTIVATIONS, ModelConfig, MoEConfig, QueryScaling
from reference.config_keys import CONSUMED, CONSUMED_BY_WRAPPERS, NEUTRAL, OF_IMAGES, check_keys, drop_ignored
from reference.config_reader import ConfigReader
from reference.quantization_config import KEY, read_quantization
from reference.rope_config import RopeConfig, read_rope, rope_parameters

_OF_QUERY_SCALING = frozenset({"llama_4_scaling_beta", "max_position_embeddings", "original_max_position_embeddings"})
"""Keys among the RoPE parameters of models that scale their queries; max_position_embeddings there is not read."""


def read_hf(mapping: Mapping[str, Any], *, ignore_keys: Collection[str] = (), text_only: bool = False) -> ModelConfig:
    """Read the parsed content of a config.json.

    ignore_keys: keys to pass over although Cierzo does not know them ("rope_scaling.KEY" for one inside).
    text_only: read the language model out of one that takes images as well; of no effect on others.
    Raises ConfigError, naming key, value, cause and way out, for anything that cannot be represented exactly.
    """
    reader = ConfigReader(mapping)
    kind = reader.string("model_type")
    if kind in WRAPPERS:
        return _read_text_side(mapping, kind, WRAPPERS[kind], ignore_keys, text_only)
    _refuse_unknown(reader, kind)
    row = ARCHITECTURES[kind]
    return _read(ConfigReader(drop_ignored(mapping, ignore_keys, CONSUMED | row.keys)), kind, row, ignore_keys)


def _refuse_unknown(reader: ConfigReader, kind: str) -> None:
    if kind not in ARCHITECTURES:
        reader.refuse(
            "model_type",
            f"Cierzo builds {', '.join(ARCHITECTURES)} only, and the text side of {' and '.join(WRAPPERS)}",
            "Other architectures need a model of their own; see CONTRIBUTING for what that takes.",
        )


def _read_text_side(
    mapping: Mapping[str, Any], kind: str, wrapper: Wrapper, ignore_keys: Collection[str], text_only: bool
) -> ModelConfig:
    """The config of the language model inside, with what the wrapper says about it."""
    if not text_only:
        ConfigReader(mapping).refuse(
            "model_type",
            f"{wrapper.model_class} takes images, and Cierzo computes the language model alone: the vision tower, the "
            "projector behind it and the places of image tokens are missing",
            "Pass text_only=True (--text-only) for the text side, which is exact for texts without images.",
        )
    outer = ConfigReader(drop_ignored(mapping, ignore_keys, CONSUMED_BY_WRAPPERS))
    check_keys(outer, kind, CONSUMED_BY_WRAPPERS, NEUTRAL | OF_IMAGES, {})
    _check_model_class(outer, wrapper.model_class)
    inside = outer.optional_mapping("text_config")
    # Only an absent text_config is replaced; keys that one leaves out get the defaults of its own class.
    text = dict(inside) if outer.mapping.get("text_config") is not None else dict(wrapper.text_config)
    text.setdefault("model_type", wrapper.text_model)
    text_kind = ConfigReader(text, "text_config.").string("model_type")
    _refuse_unknown(ConfigReader(text, "text_config."), text_kind)
    row = ARCHITECTURES[text_kind]
    inner = ConfigReader(drop_ignored(text, ignore_keys, CONSUMED | row.keys), "text_config.")
    inherited: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id"):
        if key not in inner.mapping and key in outer.mapping:
            inherited[key] = outer.mapping[key]
    if any(outer.mapping.get(key) is not None for key in ("dtype", "torch_dtype")):
        inherited |= {key: outer.mapping.get(key) for key in ("dtype", "torch_dtype")}
    inherited["tie_word_embeddings"] = _tied(outer, inner, wrapper)
    if inner.mapping.get(KEY) is not None:
        inner.refuse(
            KEY, "a quantised layout is described outside of text_config, where readers look", "Move it there."
        )
    config = _read(ConfigReader({**inner.mapping, **inherited}, "text_config."), text_kind, row, ignore_keys)
    return replace(config, quantization=read_quantization(outer))


def _tied(outer: ConfigReader, inner: ConfigReader, wrapper: Wrapper) -> bool:
    """Whether the head is the embedding: the wrapper decides, since the head is its own and not the language model's.

    Where it says nothing the file is of the old generation, in which the language model had the head and decided.
    (transformers 5 ties Mistral 3 then unless the stored head differs from the embedding, which is the same function
    for every file that stores one; a file without one is refused for lack of it.)
    """
    inside = inner.boolean("tie_word_embeddings", False)
    tied = outer.boolean("tie_word_embeddings", inside)
    return tied or (wrapper.tied_by_either and inside)


def _read(reader: ConfigReader, kind: str, row: Architecture, ignored: Collection[str]) -> ModelConfig:
    check_keys(reader, kind, CONSUMED | row.keys, NEUTRAL | row.neutral, row.fixed)
    _check_model_class(reader, row.model_class)
    num_layers = reader.integer("num_hidden_layers", row.num_layers, most=MOST["num_layers"])
    num_heads = reader.integer("num_attention_heads", row.num_heads, most=MOST["num_heads"])
    max_position_embeddings = reader.integer("max_position_embeddings", row.max_position_embeddings)
    bos_token_ids = reader.token_ids("bos_token_id", _ids(row.bos_token_id))
    if len(bos_token_ids) > 1:
        reader.refuse("bos_token_id", "a text begins with one token", "Write one id or null.")
    rope_source = rope_parameters(reader, ignored, row.rope)
    rope = read_rope(
        reader,
        rope_source,
        default_theta=row.theta,
        max_position_embeddings=max_position_embeddings,
        types=row.rope_types,
        further_keys=_OF_QUERY_SCALING if row.query_scaling else (),
    )
    moe, intermediate_size = None, reader.integer("intermediate_size", row.intermediate_size)
    if row.experts is not None:
        moe, intermediate_size = _experts(reader, row.experts)
    all_biased = row.attention_bias and reader.boolean("attention_bias", False)
    return ModelConfig(
        architecture=kind,
        vocab_size=reader.integer("vocab_size", row.vocab_size),
        hidden_size=reader.integer("hidden_size", row.hidden_size),
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        # Null means one KV head per query head, and so does absence for some classes.
        num_kv_heads=reader.optional_integer("num_key_value_heads", row.num_kv_heads) or num_heads,
        head_dim=_head_dim(reader, row, num_heads),
        norm_eps=reader.number("rms_norm_eps", row.norm_eps),
        activation=_activation(reader),
        rope=rope,
        layer_windows=row.windows.read(reader, kind, row.window, num_layers),
        moe=moe,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        max_position_embeddings=max_position_embeddings,
        dtype=_dtype(reader),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=reader.token_ids("eos_token_id", _ids(row.eos_token_id)),
        qkv_bias=row.qkv_bias or all_biased,
        output_bias=all_biased,
        mlp_bias=row.mlp_bias and reader.boolean("mlp_bias", False),
        qk_norm=row.qk_norm,
        query_scaling=_query_scaling(rope_source, rope) if row.query_scaling else None,
        position_limit=max_position_embeddings if rope.type == "dynamic" else None,
        quantization=read_quantization(reader),
    )


def _ids(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


def _check_model_class(reader: ConfigReader, model_class: str) -> None:
    classes = reader.optional_strings("architectures")
    if classes and model_class not in classes:
        reader.refuse(
            "architectures",
            f"Cierzo computes {model_class}, a decoder with its language-model head, and nothing else",
            "Use the language-model checkpoint that this one was derived from.",
        )


def _head_dim(reader: ConfigReader, row: Architecture, num_heads: int) -> int:
    head_dim = reader.optional_integer("head_dim", row.head_dim)
    if head_dim is not None:
        return head_dim
    hidden_size = reader.integer("hidden_size", row.hidden_size)
    if hidden_size % num_heads:
        reader.refuse(
            "hidden_size",
            f"it is not a multiple of num_attention_heads = {num_heads} and there is no head_dim",
            "Write the head_dim that the weights were trained with.",
        )
    return hidden_size // num_heads


def _activation(reader: ConfigReader) -> str:
    activation = reader.string("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        reader.refuse(
            "hidden_act",
            f"Cierzo computes {', '.join(sorted(SUPPORTED_ACTIVATIONS))} only",
            "Use a checkpoint with one of these activations.",
        )
    return activation


def _dtype(reader: ConfigReader) -> str:
    new, old = (reader.string(key) if reader.mapping.get(key) is not None else None for key in ("dtype", "torch_dtype"))
    if new is not None and old is not None and new != old:
        reader.refuse("dtype", f"torch_dtype says {old!r}", "Keep the one that names the type of the tensors.")
    dtype = new or old or "float32"
    if dtype not in DTYPES:
        reader.refuse(
            "dtype" if new is not None else "torch_dtype",
            f"Cierzo reads weights of {', '.join(DTYPES)} only",
            "Convert the tensors to one of these types and name it here.",
        )
    return dtype


def _experts(reader: ConfigReader, experts: Experts) -> tuple[MoEConfig, int]:
    """The mixture, and the intermediate size of each expert."""
    names = [key for key in ("num_local_experts", "num_experts") if key in reader.mapping]
    counts = {key: reader.integer(key, most=MOST["num_experts"]) for key in names}
    if len(set(counts.values())) > 1:
        reader.refuse("num_experts", "num_local_experts says another number", "Keep one of the two.")
    key = experts.renormalised_by
    if key is not None and not reader.boolean(key, False):
        reader.refuse(
            key,
            "Cierzo's router scales the weights of a token's experts so that they sum to one, and this model would not "
            "(false is what an absent key means)",
            "Use a checkpoint in which it is true, as in the published ones.",
        )
    count = next(iter(counts.values()), experts.count)
    moe = MoEConfig(count, reader.integer("num_experts_per_tok", experts.top_k))
    return moe, reader.integer(experts.size_key, experts.size)


def _query_scaling(rope_source: ConfigReader, rope: RopeConfig) -> QueryScaling | None:
    """Llama 4's scaling, of which transformers takes both numbers from the RoPE parameters; None for a beta of zero."""
    beta = rope_source.mapping.get("llama_4_scaling_beta")
    if beta == 0 and not isinstance(beta, bool):
        return None
    beta = rope_source.number("llama_4_scaling_beta")
    length = rope.original_max_position_embeddings or rope_source.integer("original_max_position_embeddings")
    return QueryScaling(beta, length)
