"""Binding checkpoint tensors to parameters: every layout, nothing missing, nothing left over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.checkpoint import SINGLE_FILE, open_checkpoint
from reference.weights import WeightSource, bind, load_parameter, parameter_shapes, unused_reason
from runtime.errors import CheckpointError
from tests.support.checkpoints import load_oracle, make_checkpoint
from tests.support.twins import make_twin, published, shrunk


def replace_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Rewrite the single file with tensors added, exchanged, or (None) left out."""
    tensors = load_file(folder / SINGLE_FILE) | {name: t for name, t in changes.items() if t is not None}
    kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}
    save_file(kept, folder / SINGLE_FILE, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refusal(folder: Path) -> str:
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught:
        bind(checkpoint)
    return str(caught.value)


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder, text_only=True)
    return {name: load_parameter(checkpoint, source, dtype) for name, source in bind(checkpoint).items()}


def theirs(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters that transformers loads from the folder, under the names of the reference model."""
    parameters: dict[str, torch.Tensor] = {}
    oracle = load_oracle(folder)
    for stored, tensor in oracle.named_parameters():
        if "vision_tower" in stored or "multi_modal" in stored:
            continue
        name = stored.removeprefix("model.").removeprefix("language_model.")
        if name.endswith("qkv_proj.weight"):
            config = oracle.config
            rows = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
            parts = tensor.split([count * (tensor.shape[0] // sum(rows)) for count in rows])
            parameters |= {name.replace("qkv", which): part for which, part in zip("qkv", parts, strict=True)}
        elif name.endswith("mlp.gate_up_proj.weight"):
            halves = zip(("gate", "up"), tensor.chunk(2), strict=True)
            parameters |= {name.replace("gate_up", which): half for which, half in halves}
        elif name.endswith("mlp.experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            prefix = name.removesuffix("mlp.experts.gate_up_proj") + "moe."
            parameters |= {prefix + "gate_proj": gate, prefix + "up_proj": up}
        else:
            name = name.replace("mlp.experts.down_proj", "moe.down_proj").replace(
                "mlp.gate.weight", "moe.router.weight"
            )
            parameters[name] = tensor
    return parameters


CASES = [
    {},
    {"head_dim": 12, "num_kv_heads": 1},
    {"tie": True},
    {"shards": 4, "dtype": "bfloat16", "generation": "old"},
    {"architecture": "ministral", "layer_windows": [5, None]},
    {"architecture": "mixtral", "dtype": "float16"},
    {"architecture": "mixtral", "num_experts": 8, "top_k": 3, "shards": 3},
    {"architecture": "mixtral", "num_experts": 1, "top_k": 1},
    {"architecture": "mixtral", "expert_layout": "stacked", "shards": 2},
    {"architecture": "mixtral", "expert_layout": "stacked", "tie": True},
    {"architecture": "llama", "attention_bias": True, "mlp_bias": True},
    {"architecture": "qwen2", "dtype": "bfloat16", "shards": 2},
    {"architecture": "qwen3", "attention_bias": True, "tie": True},
    {"architecture": "qwen3_moe", "num_experts": 8, "top_k": 3, "shards": 3},
    {"architecture": "qwen3_moe", "expert_layout": "stacked", "attention_bias": True},
    {"architecture": "phi3", "head_dim": 6, "num_kv_heads": 1},
    {"architecture": "phi3", "tie": True, "dtype": "float16"},
    {"architecture": "ministral3"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_is_that_of_transformers(tmp_path: Path, case: dict[str, object]) -> None:
    folder = make_checkpoint(tmp_path, **case)  # type: ignore[arg-type]
    loaded, expected = ours(folder), theirs(folder)
    assert loaded.keys() == expected.keys()
    assert list(loaded) == list(parameter_shapes(open_checkpoint(folder).config))
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "architecture,expert", [("mixtral", "block_sparse_moe.experts.0.w1"), ("qwen3_moe", "mlp.experts.0.gate_proj")]
)
def test_two_expert_layouts_give_equal_parameters(tmp_path: Path, architecture: str, expert: str) -> None:
    layouts = ("per_expert", "stacked")
    folders = [make_checkpoint(tmp_path / name, architecture=architecture, expert_layout=name) for name in layouts]
    assert any("experts.gate_up_proj" in name for name in open_checkpoint(folders[1]).tensors)
    assert any(expert in name for name in open_checkpoint(folders[0]).tensors)
    one, other = (ours(folder) for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_shapes_of_the_sources(tmp_path: Path) -> None:
    for layout in ("per_expert", "stacked"):
        folder = make_checkpoint(tmp_path / layout, architecture="mixtral", expert_layout=layout, num_layers=1)
        checkpoint = open_checkpoint(folder)
        for name, source in bind(checkpoint).items():
            assert source.parameter == name
            assert load_parameter(checkpoint, source, torch.float32).shape == source.shape
            assert isinstance(source, WeightSource)
            assert all(checkpoint.tensors[piece.tensor].shape == piece.tensor_shape for piece in source.pieces)


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("name", ["Pixtral-12B", "Mistral-Small-3.1-24B", "Ministral-3-3B"])
def test_the_text_side_of_a_model_with_a_vision_tower(tmp_path: Path, name: str, old_names: bool) -> None:
    """Names of both generations, tied and not; what reads images is declared unused, and only where that was asked."""
    folder = make_twin(tmp_path, shrunk(published(name)), old_names=old_names)
    checkpoint = open_checkpoint(folder, text_only=True)
    prefix = "language_model.model." if old_names else "model.language_model."
    assert prefix + "embed_tokens.weight" in checkpoint.tensors
    loaded, expected = ours(folder), theirs(folder)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    used = {name for source in bind(checkpoint).values() for name in source.tensors}
    images = [name for name in checkpoint.tensors if name not in used]
    assert {name.removeprefix("model.").split(".")[0] for name in images} == {"vision_tower", "multi_modal_projector"}
    for unread in images:
        assert unused_reason(checkpoint.config, unread, text_only=True) is not None
        assert unused_reason(checkpoint.config, unread) is None
    with pytest.raises(CheckpointError, match="has no use for"):
        bind(replace(checkpoint, text_only=False))


def test_a_wrapper_whose_head_is_stored_though_tied(tmp_path: Path) -> None:
    folder = make_twin(tmp_path, shrunk(published("Ministral-3-3B")))
    embedding = load_file(folder / SINGLE_FILE)["language_model.model.embed_tokens.weight"]
    replace_tensors(folder, {"language_model.lm_head.weight": embedding.clone()})
    assert "lm_head.weight" not in ours(folder)
    replace_tensors(folder, {"language_model.lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"its language_model\.lm_head\.weight differs from language_model"):
        bind(open_checkpoint(folder, text_only=True))


def test_a_tied_head_may_be_stored_too_or_alone(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie=True, num_layers=1)
    embedding = load_file(folder / SINGLE_FILE)["model.embed_tokens.weight"]
    replace_tensors(folder, {"lm_head.weight": embedding.clone()})
    assert torch.equal(ours(folder)["embed_tokens.weight"], embedding)
    assert "lm_head.weight" not in ours(folder)
    replace_tensors(folder, {"lm_head.weight": embedding.clone(), "model.embed_tokens.weight": None})
    assert torch.equal(ours(folder)["embed_tokens.weight"], embedding)


@pytest.mark.parametrize("tie", [True, False])
def test_names_of_a_model_that_was_saved_without_its_head_class(tmp_path: Path, tie: bool) -> None:
    folder = make_checkpoint(tmp_path, tie=tie, num_layers=1)
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / SINGLE_FILE).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    expected = theirs(folder)
    assert ours(folder).keys() == expected.keys() - ({"lm_head.weight"} if tie else set())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours(folder).items())
    if not tie:
        replace_tensors(folder, {"lm_head.weight": None})
        assert "lacks 1 tensor (lm_head.weight)" in refusal(folder)


def test_every_stored_head_of_a_tied_model_is_compared(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie=True, num_layers=1)
    embedding = load_file(folder / SINGLE_FILE)["model.embed_tokens.weight"]
    replace_tensors(folder, {"lm_head.weight": embedding.clone(), "language_model.lm_head.weight": embedding + 1})
    assert "its language_model.lm_head.weight differs from model.embed_tokens.weight" in refusal(folder)


@pytest.mark.parametrize("change", ["value", "dtype"])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, change: str) -> None:
    folder = make_checkpoint(tmp_path, tie=True, num_layers=1)
    head = load_file(folder / SINGLE_FILE)["model.embed_tokens.weight"].clone()
    if change == "value":
        head[-1, -1] += 1
    else:
        head = head.to(torch.bfloat16)
    replace_tensors(folder, {"lm_head.weight": head})
    assert "says tie_word_embeddings, but its lm_head.weight differs" in refusal(folder)


def test_rotary_buffers_are_declared_unused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    buffers: dict[str, torch.Tensor | None] = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    replace_tensors(folder, buffers)
    assert ours(folder).keys() == theirs(folder).keys()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.norm.weight": None}, "lacks 1 tensor (model.norm.weight)"),
        ({"lm_head.weight": None}, "lacks 1 tensor (lm_head.weight)"),
        ({"model.more": torch.ones(1)}, "holds 1 tensor (model.more)"),
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
            "holds 1 tensor (model.layers.0.self_attn.q_proj.bias)",
        ),
        ({"model.norm.weight": torch.ones(31)}, "model.norm.weight is [31] instead of [32]"),
        ({"model.norm.weight": torch.ones(1, 32)}, "model.norm.weight is [1, 32] instead of [32]"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "model.norm.weight (I8)) of a type"),
        ({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}, "model.norm.weight (F8_E4M3)"),
    ],
)
def test_missing_surplus_misshapen_and_packed(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], words: str
) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    replace_tensors(folder, changes)
    assert words in refusal(folder)


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    edit_config(folder, num_hidden_layers=2)
    message = refusal(folder)
    assert "lacks 9 tensors (model.layers.1.input_layernorm.weight, " in message
    assert message.count("model.layers.1.") == 5
    assert "and 4 more" in message


def test_a_config_with_fewer_layers_leaves_tensors_over(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=2)
    edit_config(folder, num_hidden_layers=1)
    assert "holds 9 tensors" in refusal(folder)


def test_missing_experts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, architecture="mixtral", num_layers=1, num_experts=4)
    edit_config(folder, num_local_experts=5)
    assert "lacks 3 tensors (model.layers.0.block_sparse_moe.experts.4.w1.weight" in refusal(folder)


def test_casts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, architecture="mixtral", num_layers=1, dtype="bfloat16")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for name, tensor in ours(folder, dtype).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, theirs(folder)[name].to(dtype)), name


def test_a_whole_piece_of_the_right_type_is_not_copied(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, num_layers=1))
    mapped = checkpoint.read("model.norm.weight")
    loaded = load_parameter(checkpoint, bind(checkpoint)["norm.weight"], torch.float32)
    assert loaded.data_ptr() == mapped.data_ptr()


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    replace_tensors(folder, {"model.norm.weight": torch.full((32,), 70000.0)})
    checkpoint = open_checkpoint(folder)
    source = bind(checkpoint)["norm.weight"]
    with pytest.raises(CheckpointError, match=r"values up to 70000, and torch\.float16 ends at 65504"):
        load_parameter(checkpoint, source, torch.float16)
    assert load_parameter(checkpoint, source, torch.bfloat16).isfinite().all()
