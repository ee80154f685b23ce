"""params.json: equal to the config.json of the same model, and one refusal for each reason."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reference.checkpoint import read_config
from reference.config import ModelConfig, MoEConfig, QueryScaling
from reference.native_config import DEFAULT_MAX_POSITION_EMBEDDINGS, read_params
from reference.rope_config import RopeConfig
from runtime.errors import ConfigError

SUPPORT = Path(__file__).parents[1] / "support"
PUBLISHED = sorted(path.stem for path in (SUPPORT / "params").glob("*.json"))
MULTIMODAL = ("Ministral-3-3B", "Ministral-3-8B", "Mistral-Small-3.1-24B", "Pixtral-12B")
# params.json of Mixtral 8x22B is that of v0.3, whose vocabulary has tool tokens, and config.json that of v0.1.
OTHER_RELEASE: dict[str, dict[str, Any]] = {"Mixtral-8x22B": {"vocab_size": 32_768}}
# config.json of Ministral 8B has the window in all layers, which is another function beyond 32,768 tokens.
OTHER_FUNCTION: dict[str, dict[str, Any]] = {
    "Ministral-8B": {"architecture": "ministral", "layer_windows": (None, 32_768, 32_768, 32_768) * 9}
}


def params(**changes: Any) -> dict[str, Any]:
    """A small params.json; a key that is set to `...` is left out."""
    small = {
        "dim": 32,
        "n_layers": 4,
        "head_dim": 8,
        "hidden_dim": 48,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 64,
        "rope_theta": 1e6,
    }
    return {key: value for key, value in (small | changes).items() if value is not ...}


def refusal(content: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_params(content, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_the_config_of_its_twin(name: str) -> None:
    text_only = name in MULTIMODAL
    native = read_config(SUPPORT / "params" / f"{name}.json", text_only=text_only)
    twin = read_config(SUPPORT / "configs" / f"{name}.json", text_only=text_only)
    said = json.loads((SUPPORT / "params" / f"{name}.json").read_text(encoding="utf-8"))
    if not {"max_position_embeddings", "max_seq_len"} & said.keys():
        assert native.max_position_embeddings == DEFAULT_MAX_POSITION_EMBEDDINGS
        native = replace(native, max_position_embeddings=twin.max_position_embeddings)
    assert native == replace(twin, **OTHER_RELEASE.get(name, {}), **OTHER_FUNCTION.get(name, {}))


def test_there_are_published_files_of_every_kind() -> None:
    configs = [read_config(SUPPORT / "params" / f"{name}.json", text_only=name in MULTIMODAL) for name in PUBLISHED]
    assert {config.architecture for config in configs} == {"mistral", "mixtral", "ministral", "ministral3"}
    assert {config.rope.type for config in configs} == {"default", "yarn"}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_images_are_refused_by_name_unless_only_the_text_is_asked_for(name: str) -> None:
    content = json.loads((SUPPORT / "params" / f"{name}.json").read_text(encoding="utf-8"))
    message = refusal(content)
    assert message.startswith('params.json says vision_encoder = {"')
    for words in ("the vision encoder, the adapter", "image tokens are missing", "text_only=True (--text-only)"):
        assert words in message
    without = {key: value for key, value in content.items() if key != "vision_encoder"}
    assert read_params(content, text_only=True) == read_params(without) == read_params(without, text_only=True)


# ---------------------------------------------------------------------------------------------- what it says


def test_every_field() -> None:
    config = read_params(
        params(
            moe={"num_experts": 6, "num_experts_per_tok": 3},
            tied_embeddings=True,
            sliding_window=5,
            max_seq_len=100,
            activation="gelu",
            dtype="float16",
            model_type="transformer",
            max_batch_size=7,
        )
    )
    assert config == ModelConfig(
        architecture="mixtral",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        activation="gelu",
        rope=RopeConfig(1e6),
        layer_windows=(5, 5, 5, 5),
        moe=MoEConfig(6, 3),
        tie_word_embeddings=True,
        max_position_embeddings=100,
        dtype="float16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_what_it_does_not_say() -> None:
    config = read_params(params())
    assert (config.architecture, config.activation, config.dtype) == ("mistral", "silu", "bfloat16")
    assert (config.max_position_embeddings, config.tie_word_embeddings, config.moe) == (32_768, False, None)
    nothing = dict.fromkeys(("sliding_window", "moe", "yarn", "llama_4_scaling", "vision_encoder", "q_lora_rank"))
    assert read_params(params(**nothing, use_biases=False, multimodal={})) == config


@pytest.mark.parametrize(
    "content, windows, architecture",
    [
        (params(sliding_window=5), (5, 5, 5, 5), "mistral"),
        (params(sliding_window="5"), (5, 5, 5, 5), "mistral"),
        (params(_sliding_window=5, sliding_window=None), (5, 5, 5, 5), "mistral"),
        (params(sliding_window=[5]), (5, 5, 5, 5), "mistral"),
        (params(sliding_window=[None]), (None,) * 4, "mistral"),
        (params(sliding_window=[None, 5]), (None, 5, None, 5), "ministral"),
        (params(sliding_window=[None, 5, 5, 5]), (None, 5, 5, 5), "ministral"),
        (params(_sliding_window=[3, 5]), (3, 5, 3, 5), "ministral"),
    ],
)
def test_windows_repeat_over_the_layers(
    content: dict[str, Any], windows: tuple[int | None, ...], architecture: str
) -> None:
    config = read_params(content)
    assert (config.layer_windows, config.architecture) == (windows, architecture)


@pytest.mark.parametrize("window, theta", [({"sliding_window": 4096}, 1e4), ({"sliding_window": None}, 1e6), ({}, 1e6)])
def test_an_absent_theta_is_that_of_the_first_models(window: dict[str, Any], theta: float) -> None:
    assert read_params(params(rope_theta=..., **window)).rope.theta == theta
    assert read_params(params(rope_theta=None, **window)).rope.theta == theta


@pytest.mark.parametrize("apply_scale, attention_factor", [(False, 1.0), (True, 0.1 * math.log(16) + 1)])
def test_yarn_is_that_of_the_twin(apply_scale: bool, attention_factor: float) -> None:
    yarn = {"factor": 16, "original_max_position_embeddings": 64, "beta": 8, "alpha": 2, "apply_scale": apply_scale}
    rope = read_params(params(yarn=yarn)).rope
    assert rope == RopeConfig(
        theta=1e6,
        type="yarn",
        factor=16.0,
        original_max_position_embeddings=64,
        beta_fast=8.0,
        beta_slow=2.0,
        attention_factor=attention_factor,
    )
    twin = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}
    twin |= {"beta_slow": 2.0, "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 0.0 if apply_scale else 1.0}
    twin |= {"llama_4_scaling_beta": 0.0}
    config = ModelConfig.from_hf({"model_type": "ministral3", "rope_parameters": twin})
    assert (config.rope, config.architecture) == (rope, read_params(params(yarn=yarn)).architecture)


def test_a_factor_of_one_scales_nothing() -> None:
    yarn = {"factor": 1, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1, "apply_scale": True}
    assert read_params(params(yarn=yarn)).rope.attention_factor == 1.0


def test_yarn_and_experts_are_a_mixtral() -> None:
    yarn = {"factor": 4, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1, "apply_scale": False}
    assert read_params(params(yarn=yarn, moe={"num_experts": 4, "num_experts_per_tok": 2})).architecture == "mixtral"


def test_query_scaling_makes_a_ministral_3() -> None:
    config = read_params(params(llama_4_scaling={"original_max_position_embeddings": 64, "beta": 0.1}))
    assert (config.architecture, config.query_scaling) == ("ministral3", QueryScaling(0.1, 64))


# ---------------------------------------------------------------------------------------------- refusals

YARN = {"factor": 4, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1, "apply_scale": False}


@pytest.mark.parametrize(
    "key", ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size"]
)
def test_a_size_that_is_not_there(key: str) -> None:
    assert refusal(params(**{key: ...})).startswith(f"params.json has no {key}, which this kind of model needs")
    assert refusal(params(**{key: None})).startswith(f"params.json says {key} = null, but ")
    assert refusal(params(**{key: "4"})).startswith(f'params.json says {key} = "4", but ')
    assert refusal(params(**{key: True})).startswith(f"params.json says {key} = true, but ")
    assert refusal(params(**{key: 0})).startswith(f"params.json says {key} = 0, but it must be")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_kv_heads": 3}, "n_kv_heads = 3, but n_heads = 4 is no multiple of it"),
        ({"n_layers": 10**9}, "n_layers = 1000000000, but no model has more than "),
        ({"head_dim": 7}, "head_dim is 7, but RoPE rotates pairs"),
        ({"rope_theta": "1e6"}, 'rope_theta = "1e6", but a number belongs there'),
        ({"rope_theta": ..., "sliding_window": [5, None]}, "rope_theta = null, but readers of params.json disagree"),
        ({"sliding_window": 0}, "sliding_window = 0, but an integer of at least 1"),
        ({"sliding_window": 5.0}, "sliding_window = 5.0, but an integer of at least 1"),
        ({"sliding_window": "wide"}, 'sliding_window = "wide", but an integer of at least 1'),
        ({"sliding_window": [5, True]}, "sliding_window = [5, true], but an integer of at least 1"),
        ({"sliding_window": [5, [5]]}, "sliding_window = [5, [5]], but an integer of at least 1"),
        ({"sliding_window": []}, "its 0 entries do not repeat evenly over n_layers = 4"),
        ({"sliding_window": [5, None, 5]}, "its 3 entries do not repeat evenly over n_layers = 4"),
        ({"_sliding_window": [5] * 8}, "_sliding_window = [5, 5, 5, 5, 5, 5, 5, 5], but its 8 entries do not repeat"),
        ({"sliding_window": 5, "_sliding_window": 5}, "_sliding_window = 5, but there is a sliding_window as well"),
        ({"moe": [8, 2]}, "moe = [8, 2], but an object or null belongs there"),
        ({"moe": {"num_experts": 8}}, "has no moe.num_experts_per_tok"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "moe.num_experts_per_tok = 3, but there are 2 experts"),
        (
            {"moe": {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1}},
            "moe.num_shared_experts = 1, but Cierzo does not know what that means",
        ),
        ({"yarn": "yes"}, 'yarn = "yes", but an object or null'),
        ({"yarn": {}}, "yarn.apply_scale = null, but the key is absent"),
        ({"yarn": YARN | {"apply_scale": 1}}, "yarn.apply_scale = 1, but true or false"),
        ({"yarn": YARN | {"factor": 0}}, "yarn.factor = 0, but it must be finite and greater than zero"),
        ({"yarn": YARN | {"beta": 1, "alpha": 2}}, "yarn.beta = 1, but alpha = 2 must not be the larger"),
        ({"yarn": YARN | {"original_max_position_embeddings": 0.5}}, "an integer belongs there"),
        ({"yarn": YARN | {"truncate": False}}, "yarn.truncate = false, but Cierzo does not know"),
        ({"yarn": YARN, "rope_theta": 1.0}, "rope_theta = 1.0, but yarn divides by its logarithm"),
        ({"llama_4_scaling": 0.1}, "llama_4_scaling = 0.1, but an object or null"),
        ({"llama_4_scaling": {"beta": 0.1}}, "has no llama_4_scaling.original_max_position_embeddings"),
        ({"llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 0}}, "llama_4_scaling.beta = 0, but"),
        ({"llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 1, "x": 1}}, "llama_4_scaling.x = 1"),
        ({"tied_embeddings": 1}, "tied_embeddings = 1, but true or false"),
        ({"activation": "silly"}, 'activation = "silly", but Cierzo knows gelu, '),
        ({"dtype": "float8"}, 'dtype = "float8", but Cierzo knows float32, float16, bfloat16 only'),
        ({"max_position_embeddings": "long"}, 'max_position_embeddings = "long", but an integer'),
        ({"max_seq_len": -1}, "max_seq_len = -1, but it must be at least 1"),
        ({"model_type": "mamba"}, 'model_type = "mamba", but Cierzo builds'),
        ({"model_type": 1}, "model_type = 1, but Cierzo builds"),
        ({"q_lora_rank": 1536}, "q_lora_rank = 1536, but Cierzo's model keeps whole keys and values"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"qk_nope_head_dim": 64}, "latent attention"),
        ({"qk_rope_head_dim": 64}, "latent attention"),
        ({"v_head_dim": 128}, "latent attention"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "a quantised layout that Cierzo does not read"),
        ({"quantization_config": {}}, "a quantised layout that Cierzo does not read"),
        ({"lora": {"rank": 64, "scaling": 2.0}}, "the adapter would have to be merged"),
        ({"use_biases": True}, "the projections of Mistral's text models have no bias; accepted here: null, false"),
        ({"use_biases": 0}, "use_biases = 0, but"),
        ({"causal": False}, "Cierzo's model is a causal decoder"),
        ({"ada_rms_norm_t_cond": True}, "do not depend on a time"),
        ({"ada_rms_norm_t_cond_dim": 32}, "do not depend on a time"),
        ({"quux": None}, "quux = null, but Cierzo does not know what that means"),
        ({"vision_encoder": [1]}, "vision_encoder = [1], but an object or null"),
        (
            {"vision_encoder": {"hidden_size": 1}},
            'vision_encoder = {"hidden_size": 1}, but Cierzo\'s model reads tokens',
        ),
        ({"multimodal": {"vision_encoder_args": {}}}, "multimodal = "),
        ({"multimodal": {"whisper_model_args": {}}}, "multimodal.whisper_model_args = {}, but Cierzo does not know"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    message = refusal(params(**changes))
    assert words in message


def test_sound_is_refused_with_text_only_as_well() -> None:
    content = params(multimodal={"vision_encoder_args": {}, "whisper_model_args": {}})
    assert "multimodal.whisper_model_args" in refusal(content, text_only=True)
    assert read_params(params(multimodal={"vision_encoder_args": {}}), text_only=True) == read_params(params())


# ---------------------------------------------------------------------------------------------- keys to ignore


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"quux": 1}, "quux"),
        ({"lora": {"rank": 1}}, "lora"),
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 2, "expert_parallel": 1}}, "moe.expert_parallel"),
        ({"yarn": YARN | {"truncate": True}}, "yarn.truncate"),
    ],
)
def test_a_key_that_changes_nothing_can_be_ignored(changes: dict[str, Any], key: str) -> None:
    message = refusal(params(**changes))
    assert f"--ignore-config-key {key}" in message
    assert read_params(params(**changes), ignore_keys=[key]).num_layers == 4


@pytest.mark.parametrize("key", ["n_layers", "sliding_window", "vision_encoder", "yarn"])
def test_a_key_that_decides_something_cannot_be_ignored(key: str) -> None:
    message = refusal(params(), ignore_keys=[key])
    assert f"{key} decides what the model computes" in message
    assert "params.json" in message
    assert "params.json has no moe.num_experts" in refusal(
        params(moe={"num_experts": 4, "num_experts_per_tok": 2}), ignore_keys=["moe.num_experts"]
    )
