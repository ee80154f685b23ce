"""RopeConfig: every spelling that is read, and every refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reference.config import ModelConfig
from reference.rope import inverse_frequencies
from reference.rope_config import RopeConfig
from runtime.errors import ConfigError
from tests.support.config_json import of_transformers, refusal, small


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


@pytest.mark.parametrize("kind", ["proportional", "mrope", "nonsense"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_other_rope_types_are_refused(kind: str, spelling: str) -> None:
    message = refusal(small(rope_scaling={spelling: kind, "factor": 2.0}))
    assert f'rope_scaling.{spelling} = "{kind}"' in message
    assert "default, linear, dynamic, llama3, yarn" in message


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_rope_of_two_sets_of_frequencies_is_refused_by_name(kind: str) -> None:
    message = refusal(small(rope_scaling={"type": kind, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}))
    assert f'rope_scaling.type = "{kind}"' in message
    assert "longrope" in message


def test_dynamic_rope_is_the_default_one_up_to_its_limit() -> None:
    config = ModelConfig.from_hf(small(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=5e5))
    assert config.rope == RopeConfig(theta=5e5, type="dynamic", factor=2.0)
    assert config.position_limit == config.max_position_embeddings == 512
    assert ModelConfig.from_hf(small()).position_limit is None
    theirs = of_transformers(small(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}))
    for length in (None, 1, 511, 512):
        frequencies, factor = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=length)
        assert torch.equal(frequencies, inverse_frequencies(config.rope, config.head_dim))
        assert factor == 1.0
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=513)
    assert not torch.equal(frequencies, inverse_frequencies(config.rope, config.head_dim))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_scaling": {"type": "dynamic"}}, "no rope_scaling.factor"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 64}},
            "RoPE type dynamic has no such parameter",
        ),
        ({"rope_scaling": {"type": "linear"}}, "no rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor = 0, but it must be finite"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'rope_scaling.factor = "2", but a number'),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor = true, but a number"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, 'type says "linear"'),
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
            {"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_scaling": {"factor": None}},
            "the old and the new spelling of one thing",
        ),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2},
                "rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2},
            },
            'rope_scaling.rope_type = "yarn", but type says "linear"',
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": None}}, "truncate = null, but true or false"),
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


@pytest.mark.parametrize("key", ["type", "factor", "beta_fast", "rope_theta"])
def test_a_rope_key_that_decides_cannot_be_ignored(key: str) -> None:
    rope = {"type": "yarn", "factor": 2, "beta_fast": 16, "rope_theta": 5e5}
    message = refusal(small(rope_scaling=rope), ignore_keys=[f"rope_scaling.{key}"])
    assert f"rope_scaling.{key} decides what the model computes" in message


def test_a_rope_key_of_another_type_can_be_ignored() -> None:
    config = small(rope_scaling={"type": "linear", "factor": 2, "original_max_position_embeddings": 64})
    key = "rope_scaling.original_max_position_embeddings"
    assert f"--ignore-config-key {key}" in refusal(config)
    assert ModelConfig.from_hf(config, ignore_keys=[key]).rope.type == "linear"


def test_transformers_takes_null_for_a_ramp_that_is_not_truncated() -> None:
    """The fact behind refusing `truncate: null`: to everybody else a null is an absent key."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}
    frequencies = [
        ROPE_INIT_FUNCTIONS["yarn"](of_transformers(small(rope_theta=100.0, rope_scaling=rope | changes)))[0]
        for changes in ({}, {"truncate": False}, {"truncate": None})
    ]
    assert torch.equal(frequencies[1], frequencies[2])
    assert not torch.equal(frequencies[0], frequencies[2])


def test_transformers_takes_rope_scaling_even_if_it_says_nothing() -> None:
    """The fact behind refusing a rope_scaling of nulls beside rope_parameters."""
    linear = {"rope_type": "linear", "factor": 2.0}
    theirs = of_transformers(small(rope_parameters=linear, rope_scaling={"factor": None}))
    assert theirs.rope_parameters["rope_type"] == "default"
    assert of_transformers(small(rope_parameters=linear, rope_scaling={})).rope_parameters["rope_type"] == "linear"
    assert ModelConfig.from_hf(small(rope_parameters=linear, rope_scaling={})).rope.type == "linear"


@pytest.mark.parametrize(
    "changes",
    [{"type": "longrope"}, {"theta": 0.0}, {"factor": float("nan")}, {"type": "yarn"}, {"type": "llama3"}],
    ids=str,
)
def test_rope_config_refuses_contradictions_at_construction(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RopeConfig(**({"theta": 1e4} | changes))
