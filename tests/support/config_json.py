"""A small config.json as a mapping, and the sentence with which it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from reference.config import ModelConfig
from runtime.errors import ConfigError


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
        "sliding_window": 5,
    }
    return config | changes


def refusal(config: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(config, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message
