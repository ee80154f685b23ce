"""The architecture table against the config classes of transformers: defaults, published files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reference.architectures import ARCHITECTURES, WRAPPERS
from reference.config import ModelConfig, MoEConfig, QueryScaling
from reference.rope import inverse_frequencies
from reference.weight_maps import WEIGHT_MAPS
from tests.support.config_json import CLASSES, of_transformers, refusal, small
from tests.support.twins import CONFIGS, PUBLISHED, published

REFUSED = sorted((CONFIGS / "refused").glob("*.json"))


def windows_of(theirs: Any) -> tuple[int | None, ...]:
    """W or None for each layer, as the class's model masks them."""
    window: int | None = getattr(theirs, "sliding_window", None)
    layers: int = theirs.num_hidden_layers
    if theirs.model_type in ("ministral", "qwen2", "qwen3"):
        return tuple(window if kind == "sliding_attention" else None for kind in theirs.layer_types)
    return (window,) * layers


def assert_equal(ours: ModelConfig, theirs: Any) -> None:
    """Every field against the config object of the language model's class."""
    assert ours.architecture == theirs.model_type
    for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.num_layers, ours.num_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.norm_eps, ours.activation) == (theirs.rms_norm_eps, theirs.hidden_act)
    assert ours.layer_windows == windows_of(theirs)
    end = theirs.eos_token_id
    assert ours.eos_token_ids == (() if end is None else (end,))
    assert ours.bos_token_id == theirs.bos_token_id
    if ours.moe is None:
        assert ours.intermediate_size == theirs.intermediate_size
    else:
        assert ours.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert (ours.moe.num_experts, ours.moe.top_k) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    rope = theirs.rope_parameters
    assert (ours.rope.theta, ours.rope.type) == (rope["rope_theta"], rope["rope_type"])
    if ours.rope.type != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[ours.rope.type](theirs)
        assert torch.equal(inverse_frequencies(ours.rope, ours.head_dim), frequencies)
        assert ours.rope.attention_factor == pytest.approx(factor, rel=1e-12)
    scaled = ours.query_scaling and {"beta": ours.query_scaling.beta, "length": ours.query_scaling.length}
    beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    assert scaled == (None if beta is None else {"beta": beta, "length": length})


def assert_same_parameters(ours: ModelConfig, theirs: Any) -> None:
    """Biases and norms are parameters of the class's model, or are not."""
    model_class = getattr(transformers, ARCHITECTURES[ours.architecture].model_class)
    with torch.device("meta"):
        names = {name for name, _ in model_class(theirs).named_parameters()}
    first = "model.layers.0."
    qkv = first + ("self_attn.qkv_proj.bias" if ours.architecture == "phi3" else "self_attn.q_proj.bias")
    assert ours.qkv_bias == (qkv in names)
    assert ours.output_bias == (f"{first}self_attn.o_proj.bias" in names)
    assert ours.mlp_bias == (f"{first}mlp.down_proj.bias" in names)
    assert ours.qk_norm == (f"{first}self_attn.q_norm.weight" in names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_absent_keys_get_the_defaults_of_transformers(architecture: str) -> None:
    absent: dict[str, Any] = {"model_type": architecture}
    if architecture == "qwen3_moe":  # whose default is refused
        absent["norm_topk_prob"] = True
    ours, theirs = ModelConfig.from_hf(absent), of_transformers(absent)
    assert_equal(ours, theirs)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    theirs.num_hidden_layers, theirs.head_dim = 1, ours.head_dim  # Ministral's class makes no model without a number
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_what_transformers_reads(name: str) -> None:
    config = published(name)
    ours, theirs = ModelConfig.from_hf(config, text_only=True), of_transformers(config)
    text = theirs.text_config if config["model_type"] in WRAPPERS else theirs
    assert_equal(ours, text)
    assert ours.dtype == str(theirs.dtype).removeprefix("torch.")
    if name != "Mistral-Small-3.1-24B":  # says nothing, and both its matrices are stored: see test_twins.py
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.position_limit, text.model_type) == (None, ours.architecture)


def test_the_published_set_is_complete() -> None:
    assert len(PUBLISHED) == 27
    kinds = {published(name)["model_type"] for name in PUBLISHED}
    assert kinds == {"llama", "llava", "mistral", "mistral3", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe"}
    assert ModelConfig.from_hf(published("Ministral-3-8B"), text_only=True).architecture == "ministral3"
    assert set(CLASSES) == {*ARCHITECTURES, *WRAPPERS}


@pytest.mark.parametrize("path", REFUSED, ids=lambda path: path.stem)
def test_published_configs_that_are_refused(path: Path) -> None:
    words = {"Ministral-3-8B-FP8": "quantization_config", "Phi-3-mini-128k": "longrope"}
    assert words[path.stem] in refusal(json.loads(path.read_text()), text_only=True)


def test_rows_name_classes_and_weight_maps_that_exist() -> None:
    assert {row.weight_map for row in ARCHITECTURES.values()} == set(WEIGHT_MAPS)
    for name in (row.model_class for table in (ARCHITECTURES, WRAPPERS) for row in table.values()):
        assert hasattr(transformers, name)


BIASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {}),
    ("qwen3_moe", {"attention_bias": True}),
    ("phi3", {"pad_token_id": 0}),
    ("ministral3", {}),
]


@pytest.mark.parametrize("architecture,changes", BIASES, ids=str)
def test_biases_are_those_of_the_model(architecture: str, changes: dict[str, Any]) -> None:
    config = small(architecture, **changes)
    assert_same_parameters(ModelConfig.from_hf(config), of_transformers(config))


SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS: list[tuple[str, dict[str, Any], tuple[int | None, ...]]] = [
    ("qwen2", {"sliding_window": 5}, (None, None)),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": True}, (None, None)),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}, (None, 5)),
    ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (None, None)),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": [SLIDING, FULL]}, (5, None)),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": False, "layer_types": [FULL, FULL]}, (None, None)),
    ("qwen3_moe", {"sliding_window": 5}, (None, None)),
    ("qwen3_moe", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 9}, (5, 5)),
    ("phi3", {"sliding_window": 5, "pad_token_id": 0}, (5, 5)),
    ("ministral3", {"sliding_window": 5}, (5, 5)),
    ("llama", {"sliding_window": None, "use_sliding_window": False}, (None, None)),
]


@pytest.mark.parametrize("architecture,changes,windows", WINDOWS, ids=str)
def test_windows_of_layers(architecture: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = small(architecture, **changes)
    assert ModelConfig.from_hf(config).layer_windows == windows == windows_of(of_transformers(config))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "architecture,changes,words",
    [
        ("llama", {"sliding_window": 5}, "llama has no sliding window"),
        ("llama", {"layer_types": [SLIDING, FULL]}, "would mask by that alone"),
        ("qwen2", {"layer_types": [SLIDING, FULL]}, "then no layer slides"),
        ("qwen2", {"attention_bias": True}, "have no bias that a config can turn on"),
        ("qwen2", {"use_mrope": True}, "one position for each token"),
        ("qwen2", {"max_window_layers": -1}, "at least 0"),
        ("qwen3", {"mlp_bias": True}, "have no bias that a config can turn on"),
        ("qwen3", {"use_qk_norm": False}, "this architecture normalises queries and keys"),
        ("llama", {"use_qk_norm": True}, "does not normalise queries and keys"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 768}, "no expert that all tokens visit"),
        ("qwen3_moe", {"norm_topk_prob": False}, "sum to one"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "all mixtures of experts or none"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "all mixtures of experts or none"),
        ("qwen3_moe", {"layer_types": [SLIDING, SLIDING]}, "would mask by that alone"),
        ("qwen3_moe", {"num_experts": True}, "an integer belongs there"),
        ("phi3", {"rope_parameters": YARN}, "of the types default only here"),
        ("phi3", {"partial_rotary_factor": 0.5}, "rotates all"),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "other.Phi3ForCausalLM"}}, "own code would run"),
        ("mistral", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}, "own code would run"),
        ("ministral3", {"rope_parameters": YARN}, "no rope_parameters.llama_4_scaling_beta"),
        ("ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": -1}}, "finite and greater than zero"),
        ("ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": False}}, "a number belongs there"),
        ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "no rope_parameters.original_max"),
        ("ministral3", {"rope_parameters": {}}, "no rope_parameters.llama_4_scaling_beta"),
        ("ministral3", {"rope_theta": 5.0}, "rope_parameters says rope_theta = 1000000.0"),
        ("mistral", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, "RoPE type yarn has no such parameter"),
        ("mistral", {"num_experts": 4}, "does not know what that means for mistral"),
        ("llama", {"architectures": ["MistralForCausalLM"]}, "Cierzo computes LlamaForCausalLM"),
    ],
    ids=str,
)
def test_refusals_of_single_rows(architecture: str, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(small(architecture, **changes))


def test_an_absent_norm_topk_prob_is_false_and_refused() -> None:
    config = small("qwen3_moe")
    del config["norm_topk_prob"]
    assert "norm_topk_prob = null" in refusal(config)


def test_both_names_of_the_number_of_experts() -> None:
    for key in ("num_experts", "num_local_experts"):
        config = small("mixtral", **{key: 6})
        assert ModelConfig.from_hf(config).moe == MoEConfig(6, 2)
        assert of_transformers(config).num_local_experts == 6
    saved = CLASSES["qwen3_moe"](num_experts=16, norm_topk_prob=True).to_dict()
    assert "num_local_experts" in saved
    assert ModelConfig.from_hf(json.loads(json.dumps(saved, default=str))).moe == MoEConfig(16, 8)


def test_keys_of_qwen3_coder_that_repeat_what_the_class_does_anyway() -> None:
    repeated = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
    assert ModelConfig.from_hf(small("qwen3_moe", **repeated)) == ModelConfig.from_hf(small("qwen3_moe"))


def test_an_empty_rope_scaling_is_as_good_as_none() -> None:
    config = small("ministral3", rope_scaling={})
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(small("ministral3"))
    assert_equal(ModelConfig.from_hf(config), of_transformers(config))


def test_query_scaling_comes_from_the_rope_parameters() -> None:
    scaled = YARN | {"llama_4_scaling_beta": 0.25, "max_position_embeddings": 999}
    assert ModelConfig.from_hf(small("ministral3", rope_parameters=scaled)).query_scaling == QueryScaling(0.25, 64)
    off = small("ministral3", rope_parameters=YARN | {"llama_4_scaling_beta": 0.0})
    assert ModelConfig.from_hf(off).query_scaling is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe", "phi3", "ministral3", "mixtral"])
def test_a_config_as_transformers_5_writes_it(tmp_path: Path, architecture: str) -> None:
    config = small(architecture, pad_token_id=0)
    theirs = of_transformers(config)
    theirs.architectures = [ARCHITECTURES[architecture].model_class]
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written != config
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(config)
