"""The same model in both layouts: equal configs, bit-identical parameters, equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.checkpoint import HUGGING_FACE, NATIVE, Checkpoint, open_checkpoint
from reference.native_weights import native_source, native_unused_reason
from reference.oracle import Oracle
from reference.parameters import parameter_shapes
from reference.weight_source import half_split_order
from reference.weights import bind, load_parameter
from runtime.errors import CheckpointError
from tests.support.checkpoints import make_checkpoint
from tests.support.native import as_native, interleaved

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}
AS_PUBLISHED = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
TWINS: dict[str, dict[str, Any]] = {
    "gqa, odd window": {},
    "mqa, wide heads, bfloat16": {"num_kv_heads": 1, "head_dim": 12, "dtype": "bfloat16", "rope_theta": 1e6},
    "mha, two dimensions, no window, float16": {
        "num_kv_heads": 4,
        "head_dim": 2,
        "window": None,
        "dtype": "float16",
        "activation": "gelu",
    },
    "mixtral": {"architecture": "mixtral", "window": None, "shards": 2},
    "mixtral, one expert, tied": {"architecture": "mixtral", "num_experts": 1, "top_k": 1, "tie": True},
    "ministral, windows by layer": {"architecture": "ministral", "num_layers": 4, "layer_windows": [None, 5] * 2},
    "old config, tied": {"generation": "old", "tie": True},
    "yarn, scaled queries, tied": {"architecture": "ministral3", "rope": YARN | AS_PUBLISHED, "tie": True},
    "yarn, scaled angles": {"architecture": "ministral3", "rope": YARN | {"llama_4_scaling_beta": 0.0}},
    "mixtral with yarn": {"architecture": "mixtral", "rope": YARN},
}


def parameters(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: load_parameter(checkpoint, source, torch.float32) for name, source in bind(checkpoint).items()}


def bind_refusal(folder: Path, **options: Any) -> str:
    checkpoint = open_checkpoint(folder, **options)
    with pytest.raises(CheckpointError) as caught:
        bind(checkpoint)
    return str(caught.value)


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "consolidated.safetensors"
    save_file(load_file(file) | tensors, file)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return as_native(make_checkpoint(tmp_path / "hf", num_layers=1), tmp_path / "native")


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_one_model(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path / "hf", **TWINS[name])
    twins = open_checkpoint(folder), open_checkpoint(as_native(folder, tmp_path / "native"))
    assert [twin.layout for twin in twins] == [HUGGING_FACE, NATIVE]
    assert [twin.config_file.name for twin in twins] == ["config.json", "params.json"]
    assert twins[0].config == twins[1].config
    one, other = (parameters(twin) for twin in twins)
    assert list(one) == list(other) == list(parameter_shapes(twins[0].config))
    for parameter in one:
        assert torch.equal(one[parameter], other[parameter]), parameter
        assert other[parameter].is_contiguous()
    rows = [[5, 9, 1, 33, 2, 60, 7, 8, 3, 11, 12, 13], [4]]
    # Not in float32: products over mapped memory are rounded by where in the file a tensor begins.
    logits = [Oracle(twin).logits(rows, torch.float64) for twin in twins]
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


@pytest.mark.parametrize("shards, index", [(2, True), (5, True), (2, False), (5, False)])
def test_sharded_native_files(tmp_path: Path, shards: int, index: bool) -> None:
    folder = make_checkpoint(tmp_path / "hf", num_layers=1)
    native = open_checkpoint(as_native(folder, tmp_path / "native", shards=shards, index=index))
    assert len({entry.file for entry in native.tensors.values()}) == shards
    expected = parameters(open_checkpoint(folder))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(native).items())


@pytest.mark.parametrize("heads, head_dim, columns", [(1, 2, 3), (4, 8, 5), (3, 12, 7)])
def test_the_order_of_rows_is_that_of_the_published_conversion(heads: int, head_dim: int, columns: int) -> None:
    """The formula of every conversion script: w.view(H, D/2, 2, C).transpose(1, 2).reshape(H·D, C)."""
    rows = heads * head_dim
    native = torch.arange(rows * columns).view(rows, columns)
    converted = native.view(heads, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    assert torch.equal(native[half_split_order(rows, head_dim)], converted)
    assert torch.equal(interleaved(converted, head_dim), native)


def test_neighbours_are_what_native_rope_rotates(native: Path) -> None:
    """Scores computed as mistral-inference does, with complex numbers over neighbours, from the stored rows."""
    checkpoint = open_checkpoint(native)
    config, stored = checkpoint.config, load_file(native / "consolidated.safetensors")
    heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
    x_TC = torch.randn(6, config.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angles_TP = torch.outer(
        torch.arange(6).double(), config.rope.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    )

    def rotated_pairs(weight: torch.Tensor, count: int) -> torch.Tensor:
        pairs = torch.view_as_complex((x_TC @ weight.double().T).view(6, count, dim // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles_TP), angles_TP)[:, None]).flatten(2)

    def rotated_halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        first, second = (x_TC @ weight.double().T).view(6, count, dim).chunk(2, dim=-1)
        cos, sin = angles_TP.cos()[:, None], angles_TP.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    loaded = parameters(checkpoint)
    prefix = "layers.0."
    scores = [
        torch.einsum("tgrd,sgd->tsgr", query.view(6, groups, heads // groups, dim), key)
        for query, key in (
            (
                rotated_pairs(stored[prefix + "attention.wq.weight"], heads),
                rotated_pairs(stored[prefix + "attention.wk.weight"], groups),
            ),
            (
                rotated_halves(loaded[prefix + "self_attn.q_proj.weight"], heads),
                rotated_halves(loaded[prefix + "self_attn.k_proj.weight"], groups),
            ),
        )
    ]
    assert torch.allclose(scores[0], scores[1], rtol=0, atol=1e-12 * float(scores[0].abs().max()))


def test_the_tensors_say_what_type_they_are(tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        folder = as_native(make_checkpoint(tmp_path / f"hf {dtype}", num_layers=1, dtype=dtype), tmp_path / dtype)
        assert open_checkpoint(folder).config.dtype == dtype
    add_tensors(folder, scale=torch.ones(2))
    assert open_checkpoint(folder).config.dtype == "bfloat16"
    said = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(said | {"dtype": "float32"}))
    assert open_checkpoint(folder).config.dtype == "bfloat16"
    save_file({"whole": torch.ones(2, dtype=torch.int8)}, folder / "consolidated.safetensors")
    assert open_checkpoint(folder).config.dtype == "float32"


# ---------------------------------------------------------------------------------------------- names


def test_every_parameter_has_a_tensor_of_its_own(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", architecture="mixtral")
    checkpoint = open_checkpoint(as_native(folder, tmp_path / "native"))
    read = [
        piece.tensor
        for name, shape in parameter_shapes(checkpoint.config).items()
        for piece in native_source(checkpoint.config, frozenset(checkpoint.tensors), name, shape).pieces
    ]
    assert sorted(read) == list(checkpoint.tensors)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_layers": 2}, "lacks 9 tensors (layers.1.attention_norm.weight"),
        ({"hidden_dim": 40}, "layers.0.feed_forward.w1.weight is [48, 32] instead of [40, 32]"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 1}}, "layers.0.feed_forward.gate.weight"),
        ({"tied_embeddings": True, "vocab_size": 63}, "tok_embeddings.weight is [64, 32] instead of [63, 32]"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = as_native(make_checkpoint(tmp_path / "hf", num_layers=1), tmp_path / "native", **changes)
    assert words in bind_refusal(folder)


def test_why_a_tensor_may_be_left_unread(native: Path, tmp_path: Path) -> None:
    tied = as_native(make_checkpoint(tmp_path / "tied", num_layers=1, tie=True), tmp_path / "native tied")
    config, tied_config = open_checkpoint(native).config, open_checkpoint(tied).config
    images = [
        "vision_encoder.patch_conv.weight",
        "vision_encoder.transformer.layers.3.attention.wq.weight",
        "vision_language_adapter.w_in.bias",
        "patch_merger.merging_layer.weight",
        "pre_mm_projector_norm.weight",
    ]
    for name in images:
        assert native_unused_reason(config, name) is None
        assert "reads images" in (native_unused_reason(config, name, text_only=True) or "")
    assert native_unused_reason(config, "output.weight") is None
    assert "tied" in (native_unused_reason(tied_config, "output.weight") or "")
    for name in ("layers.0.attention.kv_fake_quantizer.qscale_act", "layers.3.q_fake_quantizer.qscale_act"):
        assert "simulated quantisation" in (native_unused_reason(config, name) or "")
    for name in ("layers.0.attention.wq.qscale_weight", "layers.0.attention.wq.lora_A.weight", "patch_merger", "more"):
        assert native_unused_reason(config, name, text_only=True) is None


def test_the_language_model_of_one_that_reads_images(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "hf", num_layers=1)
    folder = as_native(plain, tmp_path / "native", vision_encoder={"hidden_size": 8})
    image = {"vision_encoder.ln_pre.weight": torch.ones(8), "vision_language_adapter.w_out.weight": torch.ones(32, 32)}
    add_tensors(folder, **image)
    checkpoint = open_checkpoint(folder, text_only=True)
    assert checkpoint.text_only
    assert checkpoint.config == open_checkpoint(plain).config
    expected = parameters(open_checkpoint(plain))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(checkpoint).items())
    add_tensors(folder, more=torch.ones(1))
    assert "holds 1 tensor (more)" in bind_refusal(folder, text_only=True)


def test_a_tied_head_may_be_stored_too_and_must_be_the_embedding(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "hf", num_layers=1, tie=True)
    folder = as_native(plain, tmp_path / "native")
    embedding = load_file(folder / "consolidated.safetensors")["tok_embeddings.weight"]
    add_tensors(folder, **{"output.weight": embedding.clone()})
    assert list(parameters(open_checkpoint(folder))) == list(parameters(open_checkpoint(plain)))
    add_tensors(folder, **{"output.weight": embedding + 1})
    message = bind_refusal(folder)
    assert "says tied_embeddings, but its output.weight differs from tok_embeddings.weight" in message
    assert "Set tied_embeddings to false" in message
    add_tensors(folder, quux=embedding)
    assert "Check that params.json belongs to these weights" in bind_refusal(folder)
