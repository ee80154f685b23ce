"""ModelConfig of the Mistral family: both generations, nulls, neutral keys. See test_architectures.py for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reference.activations import ACTIVATIONS
from reference.config import SUPPORTED_ACTIVATIONS, ModelConfig
from tests.support.checkpoints import make_checkpoint
from tests.support.config_json import small


@pytest.mark.parametrize("architecture", ["mistral", "mixtral", "ministral"])
@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
    ],
    ids=["default", "linear", "llama3", "yarn"],
)
def test_both_generations_give_equal_configs(tmp_path: Path, architecture: str, rope: dict[str, Any] | None) -> None:
    configs = []
    for generation in ("old", "new"):
        folder = make_checkpoint(
            tmp_path / generation, architecture=architecture, rope=rope, generation=generation, dtype="bfloat16"
        )
        configs.append(json.loads((folder / "config.json").read_text()))
    assert {"rope_theta", "rope_scaling", "torch_dtype"} <= configs[0].keys()
    assert {"rope_parameters", "dtype"} <= configs[1].keys()
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & configs[1].keys()
    old, new = (ModelConfig.from_hf(config) for config in configs)
    assert old == new
    assert old.dtype == "bfloat16"
    assert old.rope.type == (rope or {"rope_type": "default"})["rope_type"]


def test_an_absent_window_is_4096_for_mistral_and_none_for_mixtral() -> None:
    without = small()
    del without["sliding_window"]
    assert ModelConfig.from_hf(without).layer_windows == (4096, 4096)
    assert ModelConfig.from_hf(small(sliding_window=None)).layer_windows == (None, None)
    assert ModelConfig.from_hf({**without, "model_type": "mixtral"}).layer_windows == (None, None)


def test_nulls_that_mean_derived() -> None:
    config = ModelConfig.from_hf(small(num_key_value_heads=None, head_dim=None))
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert ModelConfig.from_hf(small(head_dim=24)).head_dim == 24


@pytest.mark.parametrize(
    "written, read", [(2, (2,)), ([2, 7], (2, 7)), ([7, 2, 7], (7, 2)), (None, ()), ([], ())], ids=str
)
def test_end_tokens(written: object, read: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf(small(eos_token_id=written)).eos_token_ids == read


def test_no_begin_token() -> None:
    assert ModelConfig.from_hf(small(bos_token_id=None)).bos_token_id is None


def test_ministral_layers_slide_by_their_kind() -> None:
    kinds = ["full_attention", "sliding_attention"]
    assert ModelConfig.from_hf(small("ministral", layer_types=kinds)).layer_windows == (None, 5)
    assert ModelConfig.from_hf(small("ministral")).layer_windows == (5, 5)
    assert ModelConfig.from_hf(small("ministral", sliding_window=None)).layer_windows == (None, None)


def test_consistent_layer_types_and_use_sliding_window_are_accepted() -> None:
    both = small(layer_types=["sliding_attention"] * 2, use_sliding_window=True)
    assert ModelConfig.from_hf(both) == ModelConfig.from_hf(small())
    none = small(sliding_window=None, layer_types=["full_attention"] * 2, use_sliding_window=False)
    assert ModelConfig.from_hf(none).layer_windows == (None, None)


def test_neutral_keys_and_fixed_keys_at_their_value_change_nothing() -> None:
    noise: dict[str, Any] = {
        "architectures": ["MistralForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.1,
        "_attn_implementation_autoset": True,
        "_attn_implementation_internal": "sdpa",
        "_flash_attn_2_enabled": True,
        "cache_implementation": "static",
        "dual_chunk_attention_config": None,
        "id2label": {"0": "a"},
        "is_llama_config": True,
        "logit_scale": 1.0,
        "max_sequence_length": 2048,
        "mlp_bias": False,
        "neftune_noise_alpha": 5,
        "pad_token_id": -1,
        "partial_rotary_factor": 1.0,
        "pretraining_tp": 2,
        "qkv_bias": False,
        "quantization_config": None,
        "rope_interleaved": False,
        "rope_scaling": None,
        "temperature": 0.7,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        "transformers_version": "4.34.0",
        "use_cache": False,
    }
    assert ModelConfig.from_hf(small(**noise)) == ModelConfig.from_hf(small())


def test_dtype_of_either_name() -> None:
    assert ModelConfig.from_hf(small(torch_dtype="float16")).dtype == "float16"
    assert ModelConfig.from_hf(small(dtype="bfloat16", torch_dtype="bfloat16")).dtype == "bfloat16"
    assert ModelConfig.from_hf(small(dtype=None, torch_dtype="bfloat16")).dtype == "bfloat16"


def test_supported_activations_are_those_that_the_model_has() -> None:
    assert set(ACTIVATIONS) == SUPPORTED_ACTIVATIONS
