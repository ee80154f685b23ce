"""ModelConfig: both generations, the defaults of transformers, the published files, and every refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reference.activations import ACTIVATIONS
from reference.config import SUPPORTED_ACTIVATIONS, ModelConfig, MoEConfig
from reference.rope_config import RopeConfig
from runtime.errors import ConfigError
from tests.support.checkpoints import make_checkpoint

PUBLISHED = sorted((Path(__file__).parents[1] / "support" / "configs").glob("*.json"))
CLASSES = {
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "ministral": transformers.MinistralConfig,
}


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


def of_transformers(config: dict[str, Any]) -> Any:
    """The config object of transformers for the same JSON."""
    return CLASSES[config["model_type"]](**{key: value for key, value in config.items() if key != "model_type"})


# ---------------------------------------------------------------------------------------------- what is read


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


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_configs_mean_what_transformers_reads(path: Path) -> None:
    published = json.loads(path.read_text())
    config, theirs = ModelConfig.from_hf(published), of_transformers(published)
    assert config.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert set(config.layer_windows) == {theirs.sliding_window}
    assert config.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert config.norm_eps == theirs.rms_norm_eps
    assert (config.num_kv_heads, config.num_layers) == (theirs.num_key_value_heads, theirs.num_hidden_layers)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.dtype == str(theirs.dtype).removeprefix("torch.")


def test_the_published_set_is_complete() -> None:
    assert len(PUBLISHED) == 9


@pytest.mark.parametrize("architecture", ["mistral", "mixtral", "ministral"])
def test_absent_keys_get_the_defaults_of_transformers(architecture: str) -> None:
    config, theirs = ModelConfig.from_hf({"model_type": architecture}), CLASSES[architecture]()
    assert config == ModelConfig(
        architecture=architecture,
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads,
        norm_eps=theirs.rms_norm_eps,
        activation=theirs.hidden_act,
        rope=RopeConfig(theta=theirs.rope_parameters["rope_theta"]),
        layer_windows=(theirs.sliding_window,) * theirs.num_hidden_layers,
        moe=MoEConfig(theirs.num_local_experts, theirs.num_experts_per_tok) if architecture == "mixtral" else None,
        tie_word_embeddings=theirs.tie_word_embeddings,
        max_position_embeddings=theirs.max_position_embeddings,
        dtype="float32",
        bos_token_id=theirs.bos_token_id,
        eos_token_ids=(theirs.eos_token_id,),
    )


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
        "id2label": {"0": "a"},
        "logit_scale": 1.0,
        "mlp_bias": False,
        "pad_token_id": -1,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "rope_scaling": None,
        "temperature": 0.7,
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


# ---------------------------------------------------------------------------------------------- RoPE


def test_theta_inside_or_outside() -> None:
    assert ModelConfig.from_hf(small(rope_theta=5e5)).rope.theta == 5e5
    assert ModelConfig.from_hf(small(rope_parameters={"rope_theta": 5e5})).rope.theta == 5e5
    scaled = small(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    assert ModelConfig.from_hf(scaled).rope == RopeConfig(theta=5e5, type="linear", factor=2.0)
    assert ModelConfig.from_hf(small("mixtral", rope_scaling={"type": "linear", "factor": 2})).rope.theta == 1e6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_factor": 0.5},
        {"mscale": 0.7, "mscale_all_dim": 0.9},
        {"mscale": 0.7, "mscale_all_dim": 0},
        {"factor": 0.5},
        {"factor": None},
    ],
    ids=str,
)
def test_yarn_attention_factor_is_that_of_transformers(changes: dict[str, Any]) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128} | changes
    ours = ModelConfig.from_hf(small(rope_theta=1e4, rope_scaling=rope)).rope
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](of_transformers(small(rope_theta=1e4, rope_scaling=dict(rope))))
    assert ours.attention_factor == pytest.approx(expected, rel=1e-12)
    assert ours.factor == (4.0 if rope["factor"] is None else rope["factor"])


@pytest.mark.parametrize("where", ["inside", "outside", "nowhere"])
def test_original_length_as_transformers_finds_it(where: str) -> None:
    rope: dict[str, Any] = {"type": "yarn", "factor": 2.0}
    config = small(rope_theta=1e4, rope_scaling=rope)
    (rope if where == "inside" else config if where == "outside" else {})["original_max_position_embeddings"] = 128
    ours = ModelConfig.from_hf(config).rope
    theirs = of_transformers(json.loads(json.dumps(config)))
    ROPE_INIT_FUNCTIONS["yarn"](theirs)  # only now does a value at the top level take effect there
    assert ours.original_max_position_embeddings == theirs.rope_parameters["original_max_position_embeddings"]
    assert ours.original_max_position_embeddings == (512 if where == "nowhere" else 128)


def test_yarn_defaults() -> None:
    rope = ModelConfig.from_hf(small(rope_scaling={"type": "yarn", "factor": 2.0})).rope
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True)
    assert not ModelConfig.from_hf(small(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": False})).rope.truncate


def test_equal_old_and_new_spelling_may_stand_together() -> None:
    config = small(
        rope_parameters={"rope_type": "linear", "factor": 2.0}, rope_scaling={"type": "linear", "factor": 2.0}
    )
    assert ModelConfig.from_hf(config).rope.factor == 2.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "su", "mrope", "nonsense"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_other_rope_types_are_refused(kind: str, spelling: str) -> None:
    message = refusal(small(rope_scaling={spelling: kind, "factor": 2.0}))
    assert f'rope_scaling.{spelling} = "{kind}"' in message
    assert "default, linear, llama3, yarn" in message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_scaling": {"type": "linear"}}, "no rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor = 0, but it must be finite"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'rope_scaling.factor = "2", but a number'),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor = true, but a number"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "type says 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "depth": 1}}, "--ignore-config-key rope_scaling.depth"),
        ({"rope_scaling": {"type": "default", "factor": 2}}, "RoPE type default has no such parameter"),
        ({"rope_scaling": "linear"}, "an object or null"),
        ({"rope_scaling": {"type": 3}}, "a string belongs there"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates all of each head's dimensions"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by kind of layer"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6}, "rope_parameters says rope_theta = 10000.0"),
        ({"rope_parameters": {"rope_theta": -1}}, "finite and greater than zero"),
        ({"rope_theta": float("inf")}, "finite and greater than zero"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}},
            "the old and the new spelling of one thing",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "the first must be the larger",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}, "must not be the smaller"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1}, "must exceed 1"),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 128,
            },
            "rope_scaling.original_max_position_embeddings says 64",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_rope_refusals(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(small(**changes))


def test_ignored_rope_key() -> None:
    config = small(rope_scaling={"type": "linear", "factor": 2, "depth": 1})
    assert ModelConfig.from_hf(config, ignore_keys=["rope_scaling.depth"]).rope.factor == 2.0


@pytest.mark.parametrize(
    "changes",
    [{"type": "dynamic"}, {"theta": 0.0}, {"factor": float("nan")}, {"type": "yarn"}, {"type": "llama3"}],
    ids=str,
)
def test_rope_config_refuses_contradictions_at_construction(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RopeConfig(**({"theta": 1e4} | changes))


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, 'model_type = "llama", but Cierzo builds mistral, mixtral, ministral only'),
        ({"model_type": "ministral3"}, 'model_type = "ministral3"'),
        ({"model_type": None}, "a string belongs there"),
        ({"hidden_act": "xielu"}, 'hidden_act = "xielu", but Cierzo computes gelu'),
        ({"architectures": ["MistralForSequenceClassification"]}, "Cierzo computes MistralForCausalLM"),
        ({"architectures": "MistralForCausalLM"}, "a list of strings"),
        ({"quux": 1}, "quux = 1, but Cierzo does not know what that means for mistral"),
        ({"quux": 1}, "--ignore-config-key quux"),
        ({"num_experts_per_tok": 2}, "does not know what that means for mistral"),
        ({"attention_bias": True}, "attention_bias = true, but the projections of Cierzo's model have no bias"),
        ({"mlp_bias": True}, "have no bias"),
        ({"partial_rotary_factor": 0.5}, "rotates all"),
        ({"partial_rotary_factor": True}, "rotates all"),
        ({"quantization_config": {"bits": 4}}, "a quantised layout"),
        ({"attn_logit_softcapping": 50.0}, "does not cap any logits"),
        ({"final_logit_softcapping": 30.0}, "does not cap any logits"),
        ({"use_qk_norm": True}, "does not normalise queries and keys"),
        ({"qk_norm": True}, "does not normalise queries and keys"),
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
        ({"layer_types": ["sliding_attention", "full_attention"]}, "the model_type of these weights is ministral"),
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
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(small(**changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 must lie between 1 and num_local_experts = 8"),
        ({"num_experts_per_tok": 0}, "at least 1"),
        ({"num_local_experts": None}, "an integer belongs there"),
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
        {"architecture": "llama"},
        {"num_heads": 0},
        {"layer_windows": (5,)},
        {"layer_windows": (5, 0)},
        {"norm_eps": float("nan")},
        {"activation": "elu"},
        {"moe": MoEConfig(4, 2)},
        {"dtype": "float64"},
        {"max_position_embeddings": 0},
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
