"""RoPE: frequencies, angles and the rotation itself, bit by bit those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb

from reference.config import ModelConfig, RopeConfig
from reference.rope import RotaryAngles, inverse_frequencies, rotate

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 16.0}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 8192},
    "llama3, ramp over everything": LLAMA3 | {"original_max_position_embeddings": 64, "high_freq_factor": 16.0},
    "yarn": YARN | {"original_max_position_embeddings": 16384},
    "yarn, no truncation": YARN | {"original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 16.0},
    "yarn, own factor": YARN | {"original_max_position_embeddings": 64, "attention_factor": 0.75, "beta_slow": 2.0},
    "yarn, mscale": YARN | {"original_max_position_embeddings": 512, "mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn, one mscale": YARN | {"original_max_position_embeddings": 512, "mscale": 0.8},
}


def both(name: str, theta: float, head_dim: int) -> tuple[RopeConfig, Any]:
    """Our RoPE config and the rotary module of transformers, out of one config."""
    parameters = TYPES[name] | {"rope_theta": theta}
    theirs = transformers.MistralConfig(
        head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=131072, vocab_size=64
    )
    ours = ModelConfig.from_hf(theirs.to_dict() | {"model_type": "mistral", "dtype": "float32"})
    return ours.rope, MistralRotaryEmbedding(theirs)


@pytest.mark.parametrize("theta,head_dim", [(1e4, 128), (1e6, 128), (1e6, 24), (1e8, 64), (500000.0, 2)])
@pytest.mark.parametrize("name", TYPES)
def test_frequencies_and_attention_factor(name: str, theta: float, head_dim: int) -> None:
    rope, module = both(name, theta, head_dim)
    frequencies = inverse_frequencies(rope, head_dim)
    assert frequencies.dtype == torch.float32
    assert frequencies.shape == (head_dim // 2,)
    assert torch.equal(frequencies, module.inv_freq)
    assert rope.attention_factor == module.attention_scaling
    if name != "default":
        initial, factor = ROPE_INIT_FUNCTIONS[rope.type](module.config, None)
        assert torch.equal(frequencies, initial)
        assert rope.attention_factor == factor


def test_types_really_differ() -> None:
    values = [tuple(inverse_frequencies(both(name, 1e6, 128)[0], 128).tolist()) for name in TYPES]
    assert len(set(values)) == len(TYPES) - 1, "the two with mscale differ by the attention factor alone"


@pytest.mark.parametrize("name", TYPES)
def test_angles_and_rotation(name: str) -> None:
    rope, module = both(name, 1e6, 24)
    position = torch.tensor([[0, 1, 2, 4095, 4096], [7, 131071, 2**20, 2**24 - 2, 2**24 - 1]])
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, heads, 5, 24, generator=generator) for heads in (4, 2))
    cos, sin = RotaryAngles(rope, 24)(position, torch.float32)
    their_cos, their_sin = module(query, position)
    assert torch.equal(cos, their_cos[..., :12])
    assert torch.equal(sin, their_sin[..., :12])
    their_query, their_key = apply_rotary_pos_emb(query, key, their_cos, their_sin)
    assert torch.equal(rotate(query, cos, sin), their_query)
    assert torch.equal(rotate(key, cos, sin), their_key)


def test_float64_differs_by_rounding_alone_at_any_position() -> None:
    """The angle is float32 by definition; a float64 angle at 2²⁴ would be another angle altogether."""
    rotary = RotaryAngles(RopeConfig(theta=1e6), 128)
    position = torch.tensor([[5, 40_000, 2**24 - 1]])
    narrow, wide = rotary(position, torch.float32), rotary(position, torch.float64)
    assert wide[0].dtype == torch.float64
    for one, other in zip(narrow, wide, strict=True):
        assert float((one - other).abs().max()) < 2**-23


def test_half_precision_is_rotated_in_float32() -> None:
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    cos, sin = RotaryAngles(RopeConfig(theta=1e4), 8)(torch.arange(3)[None], torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    rotated = rotate(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), cos, sin).to(torch.bfloat16))


def test_position_zero_turns_nothing_and_rotation_keeps_lengths() -> None:
    x = torch.randn(1, 1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cos, sin = RotaryAngles(RopeConfig(theta=1e4), 8)(torch.tensor([[0, 9]]), torch.float64)
    rotated = rotate(x, cos, sin)
    assert torch.equal(rotated[0, 0, 0], x[0, 0, 0])
    assert not torch.allclose(rotated[0, 0, 1], x[0, 0, 1])
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-14)


def test_frequencies_are_no_part_of_the_weights(tmp_path: Path) -> None:
    assert RotaryAngles(RopeConfig(theta=1e4), 8).state_dict() == {}
