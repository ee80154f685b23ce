"""Every config.json that is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers

from reference.config import ModelConfig, MoEConfig, QueryScaling
from runtime.errors import ConfigError
from tests.support.config_json import of_transformers, refusal, small


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model_type": "gemma"},
            'model_type = "gemma", but Cierzo builds mistral, mixtral, ministral, ministral3, llama',
        ),
        ({"model_type": "gemma"}, "only, and the text side of mistral3 and llava"),
        ({"model_type": "llava"}, "LlavaForConditionalGeneration takes images"),
        (
            {"model_type": "mistral3"},
            "the vision tower, the projector behind it and the places of image tokens are missing",
        ),
        ({"model_type": "mistral3"}, "--text-only"),
        ({"model_type": None}, "a string belongs there"),
        ({"hidden_act": "xielu"}, 'hidden_act = "xielu", but Cierzo computes gelu'),
        ({"architectures": ["MistralForSequenceClassification"]}, "Cierzo computes MistralForCausalLM"),
        ({"architectures": "MistralForCausalLM"}, "a list of strings"),
        ({"quux": 1}, "quux = 1, but Cierzo does not know what that means for mistral"),
        ({"quux": 1}, "--ignore-config-key quux"),
        ({"num_experts_per_tok": 2}, "does not know what that means for mistral"),
        ({"attention_bias": True}, "attention_bias = true, but the projections of this architecture have no bias"),
        ({"mlp_bias": True}, "have no bias"),
        ({"partial_rotary_factor": 0.5}, "rotates all"),
        ({"partial_rotary_factor": True}, "rotates all"),
        ({"quantization_config": {"bits": 4}}, "a quantised layout"),
        ({"attn_logit_softcapping": 50.0}, "does not cap any logits"),
        ({"final_logit_softcapping": 30.0}, "does not cap any logits"),
        ({"use_qk_norm": True}, "does not normalise queries and keys"),
        ({"qk_norm": True}, "does not normalise queries and keys"),
        ({"qkv_bias": True}, "have no bias"),
        ({"rope_interleaved": True}, "rows of queries and keys would be in another order"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "attends to long texts whole, and not in chunks"),
        ({"is_causal": False}, "a causal decoder"),
        ({"is_encoder_decoder": True}, "a causal decoder"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "own code would run"),
        ({"per_layer_config": {"0": {"sliding_window": 3}}}, "differ in their window only"),
        ({"residual_multiplier": 0.22}, "no such multiplier"),
        ({"sliding_window": 0}, "sliding_window = 0, but it must be at least 1"),
        ({"sliding_window": -1}, "sliding_window = -1, but it must be at least 1"),
        ({"sliding_window": True}, "sliding_window = true, but an integer belongs there"),
        ({"sliding_window": 4096.0}, "sliding_window = 4096.0, but an integer belongs there"),
        ({"use_sliding_window": False}, "mistral does not read this key and goes by sliding_window, which is 5"),
        ({"use_sliding_window": True, "sliding_window": None}, "goes by sliding_window, which is None"),
        ({"use_sliding_window": 1}, "true or false belongs there"),
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            "the model_type of these weights is another one, such as ministral",
        ),
        ({"layer_types": ["full_attention"] * 2}, "would mask by that alone"),
        ({"layer_types": ["sliding_attention"]}, "it has 1 entries for 2 layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "sliding_attention and full_attention only"),
        ({"vocab_size": 0}, "it must be at least 1"),
        ({"vocab_size": "64"}, 'vocab_size = "64", but an integer belongs there'),
        ({"hidden_size": True}, "hidden_size = true, but an integer belongs there"),
        ({"hidden_size": None}, "hidden_size = null, but an integer belongs there"),
        ({"num_hidden_layers": -2}, "it must be at least 1"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "must be even"),
        ({"hidden_size": 30}, "it is not a multiple of num_attention_heads = 4 and there is no head_dim"),
        ({"rms_norm_eps": 0}, "finite and greater than zero"),
        ({"rms_norm_eps": "1e-5"}, "a number belongs there"),
        ({"tie_word_embeddings": 0}, "true or false"),
        ({"dtype": "float8_e4m3fn"}, "weights of float32, float16, bfloat16 only"),
        ({"torch_dtype": "auto"}, 'torch_dtype = "auto"'),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "torch_dtype says 'bfloat16'"),
        ({"eos_token_id": 64}, "eos_token_id is 64, which is no id of a vocabulary of 64"),
        ({"eos_token_id": -1}, "a token id"),
        ({"eos_token_id": [True]}, "a token id"),
        ({"bos_token_id": [1, 2]}, "a text begins with one token"),
        ({"bos_token_id": 99}, "bos_token_id is 99"),
        ({"max_position_embeddings": 0}, "at least 1"),
        ({"max_position_embeddings": 2**31}, "no model has more than 2,147,483,647"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, but no model has more than 1,024"),
        ({"num_attention_heads": 10**9}, "no model has more than 16,384"),
        ({"hidden_size": 10**9}, "hidden_size is 1,000,000,000, and no model has more than"),
        ({"hidden_size": 10**400}, "no model has more than"),
        ({"rope_theta": 10**400}, "finite and greater than zero"),
        ({"rms_norm_eps": 10**400}, "finite and greater than zero"),
        ({"rms_norm_eps": 1e-300}, "to mean anything in float32"),
        ({"quux": "\ud800"}, 'quux = "\\ud800"'),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(small(**changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 must lie between 1 and the number of experts = 8"),
        ({"num_experts_per_tok": 0}, "at least 1"),
        ({"num_local_experts": None}, "an integer belongs there"),
        ({"num_local_experts": 4, "num_experts": 8}, "num_local_experts says another number"),
        ({"num_local_experts": 10**9}, "no model has more than 4,096"),
        ({"num_local_experts": 4096, "num_hidden_layers": 17}, "experts_of_all_layers is 69,632"),
    ],
)
def test_mixtral_refusals(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(small("mixtral", **changes))


def test_ministral_that_slides_needs_a_window() -> None:
    message = refusal(small("ministral", sliding_window=None, layer_types=["sliding_attention", "full_attention"]))
    assert "sliding_window is null" in message


def test_a_missing_model_type_is_refused() -> None:
    config = small()
    del config["model_type"]
    assert "no model_type" in refusal(config)


def test_ignored_keys_are_passed_over_and_consumed_ones_are_not() -> None:
    config = small(quux=1, attention_bias=True)
    assert ModelConfig.from_hf(config, ignore_keys=["quux", "attention_bias"]) == ModelConfig.from_hf(small())
    assert "hidden_size decides what the model computes" in refusal(small(), ignore_keys=["hidden_size"])


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "gemma"},
        {"architecture": "qwen3_moe"},
        {"num_heads": 0},
        {"layer_windows": (5,)},
        {"layer_windows": (5, 0)},
        {"norm_eps": float("nan")},
        {"activation": "elu"},
        {"moe": MoEConfig(4, 2)},
        {"dtype": "float64"},
        {"max_position_embeddings": 0},
        {"num_layers": 1025, "layer_windows": (None,) * 1025},
        {"vocab_size": 2**24 + 1},
        {"norm_eps": 2.0},
        {"position_limit": 0},
        {"query_scaling": QueryScaling(0.0, 16)},
        {"query_scaling": QueryScaling(float("nan"), 16)},
        {"query_scaling": QueryScaling(0.1, 0)},
    ],
    ids=str,
)
def test_contradictions_are_refused_at_construction(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="contradicts itself or Cierzo"):
        dataclasses.replace(ModelConfig.from_hf(small()), **changes)


def test_windows_may_differ_by_layer() -> None:
    assert dataclasses.replace(ModelConfig.from_hf(small()), layer_windows=(3, None)).layer_windows == (3, None)


def test_transformers_masks_by_sliding_window_and_ignores_use_sliding_window() -> None:
    """The fact behind refusing `use_sliding_window: false`: the logits at distance > L·(W − 1) do not move."""
    config = of_transformers(small(use_sliding_window=False, sliding_window=2))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    ids = torch.arange(3, 13)[None]
    changed = ids.clone()
    changed[0, 0] = 50
    with torch.no_grad():
        difference = (model(ids, use_cache=False).logits - model(changed, use_cache=False).logits).abs().amax((0, 2))
    assert (difference[:3] > 0).all()
    assert (difference[3:] == 0).all()
