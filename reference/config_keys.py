"""What each key of a Hugging Face config.json may be: read, without influence on inference, fixed, or unknown.

A config class of `transformers` accepts any key and keeps it as an attribute, so an unknown key may mean anything: a
newer architecture's extra norm, a quantised layout, or nothing. Cierzo therefore sorts every key into one of

- consumed: `reference.config` reads it;
- neutral: known to change nothing about the logits of a forward pass, whatever its value;
- fixed: would change the function, and is accepted only with the value that Cierzo's model computes;

and refuses the rest by name. `ignore_keys` (`--ignore-config-key KEY`) is the way out for somebody who knows better.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reference.config_reader import refuse, shown
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
        "layer_types",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "use_sliding_window",
        "vocab_size",
    }
)
CONSUMED_BY_MIXTRAL = frozenset({"num_experts_per_tok", "num_local_experts"})

_TRAINING_ONLY = frozenset(
    {"attention_dropout", "gradient_checkpointing", "initializer_range", "output_router_logits", "router_aux_loss_coef"}
    | {"router_jitter_noise"}
)
# pretraining_tp splits matrix products of Llama's old code into slices; Mistral's never read it.
_HOW_IT_RUNS = frozenset(
    {"_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward"}
    | {"experts_implementation", "keys_to_ignore_at_inference", "pretraining_tp", "torchscript", "use_bfloat16"}
    | {"use_cache"}
)
_WHAT_IS_RETURNED = frozenset(
    {"output_attentions", "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate"}
    | {"tie_last_hidden_states"}
)
_ABOUT_THE_FILE = frozenset(
    {"_commit_hash", "_name_or_path", "name_or_path", "transformers_version", "unsloth_fixed", "unsloth_version"}
)
_OTHER_TASKS = frozenset(
    {"classifier_dropout", "finetuning_task", "id2label", "label2id", "num_labels", "prefix", "problem_type"}
    | {"task_specific_params", "tf_legacy_loss", "tokenizer_class"}
)
# The padding row of the embedding is special in training only: its gradient is left out.
_TOKENS_OF_OTHER_ROLES = frozenset(
    {"cls_token_id", "decoder_start_token_id", "mask_token_id", "pad_token_id", "sep_token_id", "unk_token_id"}
)
# Defaults of generate(), which old versions of transformers wrote into config.json.
_GENERATION = frozenset(
    {"bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"}
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

_NO_BIAS = "the projections of Cierzo's model have no bias, as in the published Mistral models"
_NO_QK_NORM = "Cierzo's model does not normalise queries and keys"
_NO_SOFTCAP = "Cierzo's model does not cap any logits"
_NO_MULTIPLIER = "Cierzo's model has no such multiplier"
_DECODER_ONLY = "Cierzo's model is a causal decoder without cross-attention"

FIXED: dict[str, tuple[tuple[object, ...], str]] = {
    "add_cross_attention": ((False,), _DECODER_ONLY),
    "attention_bias": ((False, None), _NO_BIAS),
    "attention_multiplier": ((None,), _NO_MULTIPLIER),
    "attn_logit_softcapping": ((None,), _NO_SOFTCAP),
    "auto_map": ((None, {}), "the model's own code would run, which Cierzo cannot read"),
    "cross_attention_hidden_size": ((None,), _DECODER_ONLY),
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
    "quantization_config": ((None,), "the tensors are then packed in a quantised layout that Cierzo does not read"),
    "residual_multiplier": ((None, 1), _NO_MULTIPLIER),
    "tie_encoder_decoder": ((False,), _DECODER_ONLY),
    "use_bias": ((False, None), _NO_BIAS),
    "use_qk_norm": ((False, None), _NO_QK_NORM),
}


def drop_ignored(mapping: Mapping[str, Any], ignore_keys: Collection[str]) -> dict[str, Any]:
    """`mapping` without the keys that the user asked to ignore; raises ConfigError when one of them is consumed."""
    for key in sorted(set(ignore_keys) & (CONSUMED | CONSUMED_BY_MIXTRAL)):
        raise ConfigError(
            f"{key} decides what the model computes, so it cannot be ignored. "
            "Correct its value in a copy of config.json instead, if you are sure of the right one."
        )
    return {key: value for key, value in mapping.items() if key not in ignore_keys}


def check_keys(mapping: Mapping[str, Any], architecture: str) -> None:
    """Raise ConfigError for the first key that is not consumed, neutral, or fixed at the value that Cierzo computes."""
    consumed = CONSUMED | CONSUMED_BY_MIXTRAL if architecture == "mixtral" else CONSUMED
    for key, value in mapping.items():
        if key in consumed or key in NEUTRAL:
            continue
        if key not in FIXED:
            refuse(
                key,
                value,
                f"Cierzo does not know what that means for {architecture}, so the engine might compute something else",
                f"If it is known to change nothing at inference, pass --ignore-config-key {key}.",
            )
        allowed, cause = FIXED[key]
        if not any(type(value) is type(one) and value == one for one in (*allowed, *_floats(allowed))):
            refuse(
                key,
                value,
                f"{cause}; accepted here: {', '.join(shown(one) for one in allowed)}",
                f"Use a checkpoint without it, or pass --ignore-config-key {key} if it is known to change nothing.",
            )


def _floats(values: tuple[object, ...]) -> tuple[float, ...]:
    """The integers among `values` as floats: JSON writes 1 and 1.0 for the same number, but not for true."""
    return tuple(float(value) for value in values if isinstance(value, int) and not isinstance(value, bool))
