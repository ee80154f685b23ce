"""Quantised checkpoints whose tensors and config do not fit together, or that no blocks represent exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reference.checkpoint import open_checkpoint
from reference.packed_source import PackedSource
from reference.weights import bind, read_packed
from runtime.errors import CheckpointError, CierzoError
from tests.support.quantized_checkpoints import (
    Kind,
    Made,
    edit_config,
    edit_quantization,
    edit_tensors,
    make_quantized,
)

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
GPTQ, AWQ, PACK, INT = Kind("gptq"), Kind("awq"), Kind("pack-quantized"), Kind("int-quantized", bits=8)
SYMMETRIC = Kind("gptq", symmetric=True)


def refusal(folder: Path) -> str:
    with pytest.raises(CierzoError) as caught:
        bind(open_checkpoint(folder))
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def read(folder: Path, name: str) -> torch.Tensor:
    return open_checkpoint(folder).read(name).clone()


def tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """Changes by the last part of the names, of the layer q_proj."""
    return lambda folder: edit_tensors(folder, {f"{Q}.{part}": value for part, value in changes.items()})


def values(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """A tensor of the layer q_proj with other values."""
    return lambda folder: edit_tensors(folder, {f"{Q}.{part}": change(read(folder, f"{Q}.{part}"))})


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_quantization(folder, changes)


def weights(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_quantization(
        folder, {f"config_groups.group_0.weights.{key}": value for key, value in changes.items()}
    )


def first_word(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


CASES: dict[str, tuple[Kind, Callable[[Path], None], str]] = {
    "a tensor missing": (GPTQ, tensors(qzeros=None), f"lacks 1 tensor ({Q}.qzeros)"),
    "no order where one is due": (
        Kind("gptq", index="scattered"),
        tensors(g_idx=None),
        f"lacks 1 tensor ({Q}.g_idx)",
    ),
    "a plain weight as well": (GPTQ, tensors(weight=torch.zeros(64, 64)), "has no use for"),
    "a bias that is not zero": (GPTQ, tensors(bias=torch.ones(64)), "has no use for"),
    "a bias beside awq": (AWQ, tensors(bias=torch.zeros(64)), "has no use for"),
    "zero points of a symmetric one": (
        Kind("int-quantized", bits=8, symmetric=True),
        tensors(weight_zero_point=torch.zeros((64, 2), dtype=torch.int8)),
        "has no use for",
    ),
    "other groups": (GPTQ, config(group_size=16), "qzeros is [2, 8] instead of [4, 8]"),
    "other bits": (GPTQ, config(bits=8), "instead of"),
    "words in floating point": (AWQ, tensors(qweight=torch.zeros(64, 8)), f"{Q}.qweight (F32)"),
    "scales in float64": (PACK, values("weight_scale", torch.Tensor.double), f"{Q}.weight_scale (F64)"),
    "scattered columns": (Kind("gptq", index="scattered"), lambda folder: None, "scattered over the row (desc_act"),
    "scattered columns of compressed-tensors": (
        Kind("pack-quantized", index="scattered"),
        lambda folder: None,
        "quantise the original: cierzo export --weights int4",
    ),
    "an order that nobody set": (GPTQ, values("g_idx", lambda index: index * 0 - 1), "scattered"),
    "sym with zero points": (GPTQ, config(sym=True), "says sym, but"),
    "sym in the other format": (SYMMETRIC, config(checkpoint_format="gptq_v2"), "says sym, but"),
    "a zero point beyond its bits": (GPTQ, values("qzeros", first_word(0x1111F111)), "readers make 0, 16 or a carry"),
    "a zero point beyond 8 bits": (
        Kind("gptq", bits=8),
        values("qzeros", first_word(0x11FF1111)),
        "with the number 255, which is one less than the zero point",
    ),
    "another shape": (PACK, values("weight_shape", lambda shape: shape + 8), "weight_shape that the layer is [72, 72]"),
    "zero points missing": (PACK, tensors(weight_zero_point=None), f"lacks 1 tensor ({Q}.weight_zero_point)"),
    "a module without a scheme": (
        PACK,
        config(ignore=["lm_head", "re:.*q_proj"]),
        f"holds the layer {Q} quantised, and the quantization_config of its config.json says in no way how",
    ),
    "packed in another format": (PACK, config(format="int-quantized"), "no tensor of"),
    "another layout than said": (GPTQ, config(quant_method="awq", checkpoint_format="gemm"), "has no use for"),
    "columns that do not fill words": (PACK, weights(num_bits=8), "instead of [64, 16]"),
    "no config": (GPTQ, lambda f: edit_config(f, quantization_config=None), "from where it can be copied"),
    "a group of no block": (
        Kind("gptq", bits=8, group=8),
        lambda folder: None,
        "in groups of 8 columns, and Cierzo's blocks of 16, 32, 64, 128, 256 are no part of that",
    ),
    "sizes of another model": (AWQ, lambda f: edit_config(f, intermediate_size=128), "instead of"),
    "half a word": (GPTQ, lambda f: edit_config(f, intermediate_size=100), "which 100 does not fill"),
}


@pytest.mark.parametrize("name", CASES)
def test_bind_refuses(tmp_path: Path, name: str) -> None:
    kind, damage, words = CASES[name]
    made = make_quantized(tmp_path, kind, num_layers=1)
    damage(made.packed)
    assert words in refusal(made.packed)


def test_a_quantised_embedding(tmp_path: Path) -> None:
    made = make_quantized(tmp_path, PACK, num_layers=1, takes=lambda name: "embed_tokens" in name)
    assert "holds its embedding quantised (model.embed_tokens.weight)" in refusal(made.packed)


def test_experts_that_are_quantised_in_different_ways(tmp_path: Path) -> None:
    """Only some of them, or with other bits than the rest: they are one parameter of the engine."""
    experts = "model.layers.0.block_sparse_moe.experts."
    some = make_quantized(
        tmp_path / "some", PACK, num_layers=1, architecture="mixtral", takes=lambda name: f"{experts}0.w1" in name
    )
    assert "are quantised in different ways, or only some of them are" in refusal(some.packed)
    made = make_quantized(tmp_path / "all", PACK, num_layers=1, architecture="mixtral")
    folder, name = made.packed, "config_groups.group_0.targets"
    edit_quantization(folder, {name: ["re:.*self_attn.*", "re:.*experts.[1-3].*"]})
    assert f"holds the layer {experts}0.w1 quantised" in refusal(folder)


def unreadable(made: Made, parameter: str) -> str:
    checkpoint = open_checkpoint(made.packed)
    source = bind(checkpoint)[parameter]
    assert isinstance(source, PackedSource)
    with pytest.raises(CheckpointError) as caught:
        read_packed(checkpoint, source, None, 0, source.shape[0])
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    made = make_quantized(tmp_path, GPTQ, num_layers=1)
    scales = read(made.packed, f"{DOWN}.scales")
    scales[1, 3] = value
    edit_tensors(made.packed, {f"{DOWN}.scales": scales})
    assert f"holds {DOWN}.scales with values that are infinite" in unreadable(made, "layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("part", ["weight", "weight_zero_point"])
def test_numbers_beyond_their_bits(tmp_path: Path, part: str) -> None:
    made = make_quantized(tmp_path, Kind("int-quantized", bits=4), num_layers=1)
    tensor = read(made.packed, f"{DOWN}.{part}")
    tensor[2, 1] = 8
    edit_tensors(made.packed, {f"{DOWN}.{part}": tensor})
    assert f"{DOWN}.{part} with numbers beyond -8 and 7" in unreadable(made, "layers.0.mlp.down_proj.weight")
