"""A small config.json as a mapping, and the sentence with which it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers

from reference.config import ModelConfig
from runtime.errors import ConfigError

CLASSES = {
    "llama": transformers.LlamaConfig,
    "llava": transformers.LlavaConfig,
    "ministral": transformers.MinistralConfig,
    "ministral3": transformers.Ministral3Config,
    "mistral": transformers.MistralConfig,
    "mistral3": transformers.Mistral3Config,
    "mixtral": transformers.MixtralConfig,
    "phi3": transformers.Phi3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}


def of_transformers(config: dict[str, Any]) -> Any:
    """The config object of transformers for the same JSON."""
    settings = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    return CLASSES[config["model_type"]](**settings)


def small(architecture: str = "mistral", **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
    }
    if architecture in ("mistral", "mixtral", "ministral"):
        config["sliding_window"] = 5
    if architecture == "qwen3_moe":
        config |= {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return config | changes


def refusal(config: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(config, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message
