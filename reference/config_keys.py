"""What each key of a Hugging Face config.json may be: read, without influence on inference, fixed, or unknown.

A config class of `transformers` accepts any key and keeps it as an attribute, so an unknown key may mean anything: a
newer architecture's extra norm, a quantised layout, or nothing. Cierzo therefore sorts every key into one of

- consumed: `reference.hf_config` reads it, for all architectures (CONSUMED) or for some (`reference.architectures`);
- neutral: known to change nothing about the logits of a forward pass, whatever its value;
- fixed: would change the function, and is accepted only with the value that Cierzo's model computes;

and refuses the rest by name. `ignore_keys` (`--ignore-config-key KEY`) is the way out for somebody who knows better.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reference.config_reader import ConfigReader, shown
from runtime.errors import ConfigError

CONSUMED = frozenset(
    {
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "torch_dtype",
        "vocab_size",
    }
)
CONSUMED_BY_WRAPPERS = frozenset(
    {
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "model_type",
        "quantization_config",
        "text_config",
        "tie_word_embeddings",
        "torch_dtype",
    }
)
"""Keys that the config of a model with a vision tower has beside its text_config."""

_TRAINING_ONLY = frozenset(
    {"attention_dropout", "gradient_checkpointing", "initializer_range", "output_router_logits", "router_aux_loss_coef"}
    | {"neftune_noise_alpha", "router_jitter_noise"}
)
# pretraining_tp splits matrix products of Llama's old code into slices; Mistral's never read it.
_HOW_IT_RUNS = frozenset(
    {"_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_flash_attn_2_enabled"}
    | {"attn_implementation", "chunk_size_feed_forward", "experts_implementation", "keys_to_ignore_at_inference"}
    | {"pretraining_tp", "torchscript", "use_bfloat16", "use_cache"}
)
_WHAT_IS_RETURNED = frozenset(
    {"output_attentions", "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate"}
    | {"tie_last_hidden_states"}
)
# is_llama_config came with SmolLM, max_sequence_length with the first Llamas: nothing reads either.
_ABOUT_THE_FILE = frozenset(
    {"_commit_hash", "_name_or_path", "is_composition", "is_llama_config", "name_or_path", "transformers.js_config"}
    | {"max_sequence_length", "transformers_version", "unsloth_fixed", "unsloth_version"}
)
_OTHER_TASKS = frozenset(
    {"classifier_dropout", "finetuning_task", "id2label", "label2id", "num_labels", "prefix", "problem_type"}
    | {"task_specific_params", "tf_legacy_loss", "tokenizer_class"}
)
OF_IMAGES = frozenset(
    {"ignore_index", "image_seq_length", "image_token_id", "image_token_index", "multimodal_projector_bias"}
    | {"projector_hidden_act", "spatial_merge_size", "vision_config", "vision_feature_layer"}
    | {"vision_feature_select_strategy", "vocab_size"}
)
"""Keys of such a model that change nothing about a text without images; vocab_size repeats the language model's."""

# The padding row of the embedding is special in training only: its gradient is left out.
_TOKENS_OF_OTHER_ROLES = frozenset(
    {"cls_token_id", "decoder_start_token_id", "mask_token_id", "pad_token_id", "sep_token_id", "unk_token_id"}
)
# Defaults of generate(), which old versions of transformers wrote into config.json.
_GENERATION = frozenset(
    {"bad_words_ids", "begin_suppress_tokens", "cache_implementation", "diversity_penalty", "do_sample"}
    | {"early_stopping"}
    | {"encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"}
    | {"forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size"}
    | {"num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty"}
    | {"suppress_tokens", "temperature", "top_k", "top_p", "typical_p"}
)
NEUTRAL = (
    _TRAINING_ONLY
    | _HOW_IT_RUNS
    | _WHAT_IS_RETURNED
    | _ABOUT_THE_FILE
    | _OTHER_TASKS
    | _TOKENS_OF_OTHER_ROLES
    | _GENERATION
)

_NO_BIAS = "the projections of this architecture have no bias that a config can turn on"
_NO_QK_NORM = "Cierzo's model does not normalise queries and keys"
_NO_SOFTCAP = "Cierzo's model does not cap any logits"
_NO_MULTIPLIER = "Cierzo's model has no such multiplier"
_DECODER_ONLY = "Cierzo's model is a causal decoder without cross-attention"

Fixed = Mapping[str, tuple[tuple[object, ...], str]]
"""Key to the values that it may have, and why no others."""

FIXED: Fixed = {
    "add_cross_attention": ((False,), _DECODER_ONLY),
    "attention_bias": ((False, None), _NO_BIAS),
    "attention_multiplier": ((None,), _NO_MULTIPLIER),
    "attn_logit_softcapping": ((None,), _NO_SOFTCAP),
    "auto_map": ((None, {}), "the model's own code would run, which Cierzo cannot read"),
    "cross_attention_hidden_size": ((None,), _DECODER_ONLY),
    "dual_chunk_attention_config": ((None,), "Cierzo's model attends to long texts whole, and not in chunks"),
    "embedding_multiplier": ((None, 1), _NO_MULTIPLIER),
    "final_logit_softcapping": ((None,), _NO_SOFTCAP),
    "is_causal": ((True,), _DECODER_ONLY),
    "is_decoder": ((True, False), _DECODER_ONLY),
    "is_encoder_decoder": ((False,), _DECODER_ONLY),
    "logit_scale": ((None, 1), _NO_MULTIPLIER),
    "logits_scaling": ((None, 1), _NO_MULTIPLIER),
    "mlp_bias": ((False, None), _NO_BIAS),
    "partial_rotary_factor": ((None, 1), "Cierzo rotates all of each head's dimensions"),
    "per_layer_config": ((None, {}), "Cierzo's layers differ in their window only"),
    "pruned_heads": ((None, {}), "Cierzo's layers all have the same heads"),
    "qk_norm": ((False, None), _NO_QK_NORM),
    "qkv_bias": ((False, None), _NO_BIAS),
    "residual_multiplier": ((None, 1), _NO_MULTIPLIER),
    "rope_interleaved": ((False, None), "the rows of queries and keys would be in another order (interleaved pairs)"),
    "tie_encoder_decoder": ((False,), _DECODER_ONLY),
    "use_bias": ((False, None), _NO_BIAS),
    "use_qk_norm": ((False, None), _NO_QK_NORM),
}


def drop_ignored(
    mapping: Mapping[str, Any], ignore_keys: Collection[str], consumed: Collection[str] = CONSUMED, prefix: str = ""
) -> dict[str, Any]:
    """`mapping` without the keys that the user asked to ignore; raises ConfigError when one is in `consumed`.

    prefix: names the object in the message, as `ConfigReader` has it.
    """
    for key in sorted(set(ignore_keys) & set(consumed)):
        raise ConfigError(
            f"{prefix}{key} decides what the model computes, so it cannot be ignored. "
            "Correct its value in a copy of config.json instead, if you are sure of the right one."
        )
    return {key: value for key, value in mapping.items() if key not in ignore_keys}


def check_keys(
    reader: ConfigReader, architecture: str, consumed: Collection[str], neutral: Collection[str], further: Fixed
) -> None:
    """Raise ConfigError for the first key that is not consumed, neutral, or fixed at the value that Cierzo computes.

    further: fixed keys of this architecture, which come before the common ones.
    """
    for key, value in reader.mapping.items():
        fixed = further.get(key)
        if fixed is None and (key in consumed or key in neutral):
            continue
        fixed = fixed or FIXED.get(key)
        if fixed is None:
            reader.refuse(
                key,
                f"Cierzo does not know what that means for {architecture}, so the engine might compute something else",
                f"If it is known to change nothing at inference, pass --ignore-config-key {key}.",
            )
        allowed, cause = fixed
        if not any(type(value) is type(one) and value == one for one in (*allowed, *_floats(allowed))):
            reader.refuse(
                key,
                f"{cause}; accepted here: {', '.join(shown(one) for one in allowed)}",
                f"Use a checkpoint without it, or pass --ignore-config-key {key} if it is known to change nothing.",
            )


def _floats(values: tuple[object, ...]) -> tuple[float, ...]:
    """The integers among `values` as floats: JSON writes 1 and 1.0 for the same number, but not for true."""
    return tuple(float(value) for value in values if isinstance(value, int) and not isinstance(value, bool))
