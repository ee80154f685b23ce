"""Quantised checkpoints against their plain twins: every number, every parameter, and transformers' logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reference.checkpoint import Checkpoint, open_checkpoint
from reference.oracle import Oracle
from reference.parity import budget
from reference.quantized_layout import QuantizedFormat, unpack
from reference.weights import (
    EMBEDDING,
    LM_HEAD,
    PackedSource,
    WeightSource,
    bind,
    load_parameter,
    read_packed,
    reason_unused,
)
from runtime.errors import CheckpointError
from tests.support.checkpoints import load_oracle, oracle_logits
from tests.support.parity import largest_error, random_rows
from tests.support.quantized_checkpoints import (
    Kind,
    Made,
    edit_quantization,
    edit_tensors,
    is_linear,
    make_quantized,
    quantize_folder,
)
from tests.support.twins import make_twin, published, shrunk

KINDS = [
    Kind("gptq"),
    Kind("gptq", symmetric=True, group=16),
    Kind("gptq", bits=8, group=-1),
    Kind("gptq", bits=8, symmetric=True, scales="bfloat16"),
    Kind("gptq_v2", group=64),
    Kind("gptq_v2", bits=8, symmetric=True, group=-1, scales="float32"),
    Kind("awq"),
    Kind("awq", group=16),
    Kind("awq", group=-1),
    Kind("pack-quantized"),
    Kind("pack-quantized", symmetric=True, scales="bfloat16"),
    Kind("pack-quantized", bits=8, group=16),
    Kind("pack-quantized", group=-1, early=True),
    Kind("pack-quantized", index="unset"),
    Kind("pack-quantized", index="stored", symmetric=True),
    Kind("int-quantized", bits=8, group=-1, symmetric=True, scales="bfloat16"),
    Kind("int-quantized", bits=8),
    Kind("int-quantized", bits=4, group=16),
]
FUSED = {"architecture": "phi3", "num_kv_heads": 2, "head_dim": 16}


def assert_twins(made: Made, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, dict[str, Any]]:
    """Every parameter of the packed checkpoint has the value that it has in the plain one."""
    packed, plain = (open_checkpoint(folder, text_only=True) for folder in (made.packed, made.plain))
    sources, want = bind(packed), bind(plain)
    assert sources.keys() == want.keys()
    for name, source in sources.items():
        found = load_parameter(packed, source, dtype)
        assert found.is_contiguous()
        assert found.dtype == dtype
        assert torch.equal(found, load_parameter(plain, want[name], dtype)), name
    return packed, sources


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_those_of_transformers_on_the_plain_twin(tmp_path: Path, kind: Kind) -> None:
    made = make_quantized(tmp_path, kind)
    packed, sources = assert_twins(made)
    taken = {name for name, source in sources.items() if isinstance(source, PackedSource)}
    assert taken == {name for name in sources if is_linear(name)}
    (found,) = {sources[name].format for name in taken if "down_proj" not in name}
    block = {-1: 64}.get(kind.group, kind.group)
    assert found == QuantizedFormat(kind.bits, block, not kind.symmetric, "F16" if kind.scales == "float16" else "F32")
    rows = random_rows([23], packed.config.vocab_size, seed=1)
    truth, ours = (
        [logits.numpy() for logits in Oracle(packed).logits(rows, d)] for d in (torch.float64, torch.float32)
    )
    theirs = [oracle_logits(load_oracle(made.plain), torch.tensor(rows))[0].numpy()]
    assert largest_error(truth, theirs) <= budget(truth, ours, "float32").allowed


@pytest.mark.parametrize("layout", ["gptq", "awq", "pack-quantized", "int-quantized"])
@pytest.mark.parametrize("options", [{"architecture": "mixtral"}, {"architecture": "qwen3_moe"}, FUSED], ids=str)
def test_experts_and_fused_projections(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    """A tensor per expert makes one source [E, N, K]; parts of a fused tensor are rows of one matrix."""
    made = make_quantized(tmp_path, Kind(layout, group=16), **options)
    packed, sources = assert_twins(made)
    if "moe" in "".join(sources):
        source = sources["layers.1.moe.down_proj"]
        assert isinstance(source, PackedSource)
        assert (source.shape, len(source.pieces)) == ((4, 64, 96), 4)
        assert isinstance(sources["layers.1.moe.router.weight"], WeightSource)
        prefix = "model.layers.1." + (
            "block_sparse_moe.experts." if options["architecture"] == "mixtral" else "mlp.experts."
        )
        q, _, _ = made.q[f"{prefix}2.{'w2' if options['architecture'] == 'mixtral' else 'down_proj'}"]
    else:
        source = sources["layers.1.self_attn.v_proj.weight"]
        assert isinstance(source, PackedSource)
        assert [piece.first_row for piece in source.pieces] == [64 + 32]
        q = made.q["model.layers.1.self_attn.qkv_proj"][0][96:]
    rows = read_packed(packed, source, 2 if len(source.shape) == 3 else None, 3, 21)
    assert np.array_equal(unpack(rows, source.format, source.shape[-1])[0].numpy(), q[3:21])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_integers_zero_points_and_scales_are_those_of_the_file(tmp_path: Path, kind: Kind) -> None:
    """Any slice of rows gives the rows, number by number; larger groups become blocks with the same scale."""
    made = make_quantized(tmp_path, kind, num_layers=1)
    checkpoint = open_checkpoint(made.packed)
    sources = bind(checkpoint)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        source = sources[f"layers.0.{name}.weight"]
        assert isinstance(source, PackedSource)
        q, scale, zero = made.q[f"model.layers.0.{name}"]
        group = np.arange(source.format.blocks(q.shape[1])) * source.format.block_size * scale.shape[1] // q.shape[1]
        for first, last in ((0, len(q)), (0, 1), (5, 14), (8, 16), (9, 9), (len(q) - 3, len(q))):
            rows = read_packed(checkpoint, source, None, first, last)
            found_q, found_zero = unpack(rows, source.format, q.shape[1])
            assert np.array_equal(found_q.numpy(), q[first:last])
            assert np.array_equal(found_zero.numpy(), zero[first:last, group])
            assert np.array_equal(rows.scale.double().numpy(), scale[first:last, group])
            assert (rows.zero is None) == kind.symmetric


BLOCKS = [(16, 96, 16), (32, 96, 32), (48, 96, 16), (96, 192, 32), (128, 96, 32), (256, 512, 256), (384, 768, 128)]
BLOCKS += [(512, 1024, 128), (-1, 96, 32), (-1, 128, 128), (-1, 384, 128)]


@pytest.mark.parametrize("group,inner,block", BLOCKS)
def test_blocks_that_stand_for_groups(tmp_path: Path, group: int, inner: int, block: int) -> None:
    made = make_quantized(
        tmp_path, Kind("gptq", bits=8, group=group), num_layers=1, intermediate_size=inner,
        takes=lambda name: name.endswith("down_proj.weight"),
    )  # fmt: skip
    _, sources = assert_twins(made)
    source = sources["layers.0.mlp.down_proj.weight"]
    assert isinstance(source, PackedSource)
    assert source.format.block_size == block


def test_rows_that_fill_neither_blocks_nor_words(tmp_path: Path) -> None:
    """One group of 76 columns in blocks of 128, of which the only one is partial; 60 zero points in words of eight."""
    made = make_quantized(
        tmp_path, Kind("pack-quantized", group=-1), num_layers=1, intermediate_size=76, vocab_size=60,
        takes=lambda name: name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight"),
    )  # fmt: skip
    edit_quantization(made.packed, {"ignore": []})
    _, sources = assert_twins(made)
    source, head = sources["layers.0.mlp.down_proj.weight"], sources[LM_HEAD]
    assert isinstance(source, PackedSource)
    assert isinstance(head, PackedSource)
    assert (source.format.block_size, source.format.blocks(76)) == (128, 1)
    assert (head.format.block_size, head.shape) == (64, (60, 64))


def test_what_else_may_be_packed_or_left(tmp_path: Path) -> None:
    """The head and a router, where a file has them packed; single layers that are plain; types beside float32."""
    takes = {"lm_head.weight", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.1.self_attn.o_proj.weight"}
    made = make_quantized(
        tmp_path,
        Kind("gptq", bits=8),
        takes=takes.__contains__,
        architecture="mixtral",
        num_experts=8,
        dtype="bfloat16",
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _, sources = assert_twins(made, dtype)
    names = [name for name, source in sources.items() if isinstance(source, PackedSource)]
    assert names == ["layers.0.moe.router.weight", "layers.1.self_attn.o_proj.weight", LM_HEAD]
    assert isinstance(sources[EMBEDDING], WeightSource)


@pytest.mark.parametrize("old_names", [True, False])
def test_the_text_side_of_a_model_with_a_vision_tower(tmp_path: Path, old_names: bool) -> None:
    """Its config is the wrapper's; what is packed of the vision tower is as unread as the rest of that."""
    plain = make_twin(tmp_path / "plain", shrunk(published("Mistral-Small-3.1-24B")), old_names=old_names)
    made = quantize_folder(plain, Kind("pack-quantized", bits=8, group=-1))
    packed, sources = assert_twins(made)
    assert {name for name, source in sources.items() if isinstance(source, PackedSource)} == set(
        filter(is_linear, sources)
    )
    unread = [name for name in packed.tensors if name.endswith("weight_packed") and "vision_tower" in name]
    assert unread
    assert all(reason_unused(packed, name) is not None for name in unread)


def test_biases_stay_and_those_of_zeros_are_left_out(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "qwen", Kind("gptq"), architecture="qwen2")
    assert_twins(made)
    made = make_quantized(tmp_path / "mistral", Kind("gptq"))
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(made.packed, {name: torch.zeros(64, dtype=torch.float16)})
    packed, _ = assert_twins(made)
    assert reason_unused(packed, name) == "it is a bias of zeros, which AutoGPTQ gave to every layer"


def test_two_schemes_in_one_file(tmp_path: Path) -> None:
    """compressed-tensors with a group for each: 8 bits for one layer, whose tensors another run has packed."""
    made = make_quantized(tmp_path / "4", Kind("pack-quantized", symmetric=True), num_layers=1)
    wide = make_quantized(tmp_path / "8", Kind("pack-quantized", bits=8, symmetric=True), num_layers=1)
    module = "model.layers.0.mlp.down_proj"
    eight, four = open_checkpoint(wide.packed), open_checkpoint(made.packed)
    names = [name for name in four.tensors if name.startswith(module)]
    edit_tensors(made.packed, {name: eight.read(name).clone() for name in names})
    edit_tensors(made.plain, {f"{module}.weight": open_checkpoint(wide.plain).read(f"{module}.weight").clone()})
    groups = json.loads((made.packed / "config.json").read_text())["quantization_config"]["config_groups"]
    rest = groups["group_0"] | {"targets": ["re:.*self_attn.*", "re:.*(gate|up)_proj"]}
    second = groups["group_0"] | {"targets": [module], "weights": groups["group_0"]["weights"] | {"num_bits": 8}}
    edit_quantization(made.packed, {"config_groups": {"group_0": rest, "group_1": second}})
    _, sources = assert_twins(made)
    bits = {name: source.format.bits for name, source in sources.items() if isinstance(source, PackedSource)}
    assert {name for name, b in bits.items() if b == 8} == {"layers.0.mlp.down_proj.weight"}
    assert len(bits) == 7


def test_a_value_beyond_float16_is_refused_there_only(tmp_path: Path) -> None:
    made = make_quantized(tmp_path, Kind("pack-quantized", bits=8, scales="bfloat16"), num_layers=1)
    name = "model.layers.0.mlp.down_proj.weight_scale"
    edit_tensors(made.packed, {name: torch.full((64, 3), 2000.0, dtype=torch.bfloat16)})
    packed = open_checkpoint(made.packed)
    source = bind(packed)["layers.0.mlp.down_proj.weight"]
    assert load_parameter(packed, source, torch.float32).abs().max() > 65504
    with pytest.raises(CheckpointError, match="beyond 65504"):
        load_parameter(packed, source, torch.float16)
