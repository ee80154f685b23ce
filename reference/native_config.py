"""The model's shape and constants from a params.json, the config of Mistral's own layout.

The result is equal to that of the Hugging Face config.json of the same model, so that nothing behind it knows which of
the two was read. What params.json never says is filled in with what every published model has: the ids 1 and 2 begin
and end a text, and the context is 32,768 tokens where neither max_position_embeddings nor max_seq_len is there (v0.1
to v0.3, Codestral, the first Small; Nemo, Large and Mixtral 8x22B can do more, which `context` may ask for).

Sources: mistral-inference (args.py, cache.py, rope.py, moe.py) for the dense and routed models; yarn, llama_4_scaling
and tied_embeddings came with Ministral 3 and are read as vLLM and Hugging Face's conversion read them.

Symbols: L layers, W window.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from reference.config import DTYPES, MOST, SUPPORTED_ACTIVATIONS, ModelConfig, MoEConfig, QueryScaling
from reference.native_keys import ParamsReader, check_keys, kept
from reference.rope_config import RopeConfig

DEFAULT_MAX_POSITION_EMBEDDINGS = 32_768
BOS_TOKEN_ID, EOS_TOKEN_IDS = 1, (2,)

_VISION = ("vision_encoder", "multimodal")


def read_params(
    mapping: Mapping[str, Any], *, ignore_keys: Collection[str] = (), text_only: bool = False
) -> ModelConfig:
    """Read the parsed content of a params.json.

    ignore_keys: keys to pass over although Cierzo does not know them ("moe.KEY" for one inside an object).
    text_only: read the language model out of one that takes images as well.
    The dtype is the one under `dtype`, else bfloat16, that of all published tensors; in a folder the tensors decide
    (`reference.checkpoint.open_checkpoint`).
    Raises ConfigError, naming key, value, cause and way out, for anything that cannot be represented exactly.
    """
    reader = ParamsReader(kept(mapping, ignore_keys))
    kind = reader.mapping.get("model_type")
    if kind not in (None, "transformer"):
        reader.refuse("model_type", "Cierzo builds Mistral's transformers only", "Use a checkpoint of a transformer.")
    check_keys(reader)
    _check_vision(reader, text_only)
    num_heads, num_kv_heads = reader.integer("n_heads"), reader.integer("n_kv_heads")
    if num_heads % num_kv_heads:
        reader.refuse(
            "n_kv_heads",
            f"n_heads = {num_heads} is no multiple of it, so the query heads cannot share the KV heads evenly",
            "Check the file against the published one.",
        )
    windows = _layer_windows(reader)
    rope, moe, scaling = _rope(reader), _moe(reader), _query_scaling(reader)
    return ModelConfig(
        architecture=_architecture(rope, moe, scaling, windows),
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("dim"),
        intermediate_size=reader.integer("hidden_dim"),
        num_layers=len(windows),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=reader.integer("head_dim"),
        norm_eps=reader.number("norm_eps"),
        activation=reader.one_of("activation", "silu", sorted(SUPPORTED_ACTIVATIONS)),
        rope=rope,
        layer_windows=windows,
        moe=moe,
        tie_word_embeddings=reader.boolean("tied_embeddings", False),
        max_position_embeddings=_max_position_embeddings(reader),
        dtype=reader.one_of("dtype", "bfloat16", DTYPES),
        bos_token_id=BOS_TOKEN_ID,
        eos_token_ids=EOS_TOKEN_IDS,
        query_scaling=scaling,
    )


def _check_vision(reader: ParamsReader, text_only: bool) -> None:
    """Images are beyond Cierzo's model; the language model beside the encoder reads texts exactly as it does alone."""
    reader.inside("multimodal", ("vision_encoder_args",))
    images = [key for key in _VISION if reader.optional_mapping(key)]
    if images and not text_only:
        reader.refuse(
            images[0],
            "Cierzo's model reads tokens and no images: the vision encoder, the adapter behind it and the places of "
            "image tokens are missing",
            "Pass text_only=True (--text-only) for the language model alone, which is exact for texts without images.",
        )


def _architecture(
    rope: RopeConfig, moe: MoEConfig | None, scaling: QueryScaling | None, windows: tuple[int | None, ...]
) -> str:
    """The name that Hugging Face gives the same model: all that were published with yarn are of Ministral 3's class."""
    if moe is not None:
        return "mixtral"
    if scaling is not None or rope.type == "yarn":
        return "ministral3"
    return "ministral" if len(set(windows)) > 1 else "mistral"


def _layer_windows(reader: ParamsReader) -> tuple[int | None, ...]:
    """W or None for each layer; a list of them repeats: layer i has entry i mod its length (mistral-inference).

    Ministral 8B was first published with `_sliding_window`, which older readers passed over.
    """
    num_layers = reader.integer("n_layers", most=MOST["num_layers"])
    keys = [key for key in ("sliding_window", "_sliding_window") if reader.mapping.get(key) is not None]
    if len(keys) == 2:
        reader.refuse("_sliding_window", "there is a sliding_window as well", "Keep the one that is right.")
    key = keys[0] if keys else "sliding_window"
    value = reader.mapping.get(key)
    if not isinstance(value, list):
        return (None if value is None else _window(reader, key, value),) * num_layers
    if not value or num_layers % len(value):
        reader.refuse(
            key, f"its {len(value)} entries do not repeat evenly over n_layers = {num_layers}", "Write one for a layer."
        )
    pattern = tuple(None if entry is None else _window(reader, key, entry) for entry in value)
    return pattern * (num_layers // len(value))


def _window(reader: ParamsReader, key: str, value: object) -> int:
    """One window; old files write it as a string."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        reader.refuse(
            key, "an integer of at least 1, null, or a list of them belongs there", "Check the published file."
        )
    return value


def _rope(reader: ParamsReader) -> RopeConfig:
    """RoPE with theta, and with yarn's ramp and attention factor if there are any.

    apply_scale says whether cos and sin are multiplied by 0.1·ln(factor) + 1 (arXiv:2309.00071, eq. 22). Readers of the
    file disagree about its absence, which is therefore refused.
    """
    theta = _theta(reader)
    yarn = reader.inside("yarn", ("factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale"))
    if yarn is None:
        return RopeConfig(theta)
    if "apply_scale" not in yarn.mapping:
        yarn.refuse(
            "apply_scale",
            "the key is absent, and readers of such files disagree about what that means for the attention",
            "Write true if the weights were trained with the scale 0.1·ln(factor) + 1, or false.",
        )
    factor = yarn.number("factor")
    scaled = yarn.boolean("apply_scale", False) and factor > 1
    beta, alpha = yarn.number("beta"), yarn.number("alpha")
    if beta < alpha:
        yarn.refuse("beta", f"alpha = {alpha:g} must not be the larger", "Check the file against the published one.")
    if theta <= 1:
        reader.refuse("rope_theta", "yarn divides by its logarithm, so it must exceed 1", "Check the published file.")
    return RopeConfig(
        theta,
        type="yarn",
        factor=factor,
        original_max_position_embeddings=yarn.integer("original_max_position_embeddings"),
        beta_fast=beta,
        beta_slow=alpha,
        attention_factor=0.1 * math.log(factor) + 1.0 if scaled else 1.0,
    )


def _theta(reader: ParamsReader) -> float:
    """rope_theta, or what mistral-inference took when the first models, which lack it, were the newest.

    That is 1e4 with a window (7B v0.1) and 1e6 without. Lists of windows came later, and their files all have it.
    """
    if reader.mapping.get("rope_theta") is not None:
        return reader.number("rope_theta")
    window = reader.mapping.get("sliding_window") or reader.mapping.get("_sliding_window")
    if isinstance(window, list):
        reader.refuse(
            "rope_theta",
            "readers of params.json disagree about the value that is meant, 1e4 or 1e6",
            "Write the one that the weights were trained with.",
        )
    return 1_000_000.0 if window is None else 10_000.0


def _moe(reader: ParamsReader) -> MoEConfig | None:
    moe = reader.inside("moe", ("num_experts", "num_experts_per_tok"))
    if moe is None:
        return None
    experts, top_k = moe.integer("num_experts"), moe.integer("num_experts_per_tok")
    if top_k > experts:
        moe.refuse("num_experts_per_tok", f"there are {experts} experts", "Check the file against the published one.")
    return MoEConfig(experts, top_k)


def _query_scaling(reader: ParamsReader) -> QueryScaling | None:
    scaling = reader.inside("llama_4_scaling", ("original_max_position_embeddings", "beta"))
    if scaling is None:
        return None
    return QueryScaling(scaling.number("beta"), scaling.integer("original_max_position_embeddings"))


def _max_position_embeddings(reader: ParamsReader) -> int:
    """What the model was trained for; it decides nothing but how long a context is unless one is asked for."""
    trained = reader.optional_integer("max_position_embeddings")
    return trained or reader.optional_integer("max_seq_len") or DEFAULT_MAX_POSITION_EMBEDDINGS
