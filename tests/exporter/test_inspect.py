"""`inspect`: the published numbers from config alone, checkpoints, and tables that fit 80 columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.inspect import CONTEXTS, inspect_path, kv_use, receptive_field
from runtime.errors import CheckpointError, ConfigError
from tests.support.checkpoints import load_oracle, make_checkpoint
from tests.support.inspecting import drawn

CONFIGS = Path(__file__).parents[1] / "support" / "configs"


# ---------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    "name, total, active, unit",
    [
        ("Mistral-7B-v0.1", "7.24", "7.24", 1e9),
        ("Mistral-7B-v0.2", "7.24", "7.24", 1e9),
        ("Mistral-7B-v0.3", "7.25", "7.25", 1e9),
        ("Mixtral-8x7B", "46.7", "12.9", 1e9),
        ("Mixtral-8x22B", "141", "39", 1e9),
        ("Mistral-Nemo-12B", "12.2", "12.2", 1e9),
        ("Mistral-Large-123B", "123", "123", 1e9),
        ("Codestral-22B", "22.2", "22.2", 1e9),
        ("Ministral-8B", "8.02", "8.02", 1e9),
    ],
)
def test_published_parameter_counts(name: str, total: str, active: str, unit: float) -> None:
    parameters = inspect_path(CONFIGS / f"{name}.json").parameters
    assert parameters.active is not None
    for number, published in ((parameters.total, total), (parameters.active, active)):
        decimals = len(published.partition(".")[2])
        assert f"{number / unit:.{decimals}f}" == published
    assert parameters.groups is not None
    assert sum(parameters.groups.values()) == parameters.total


def test_exact_counts_and_groups() -> None:
    parameters = inspect_path(CONFIGS / "Mixtral-8x7B.json").parameters
    assert (parameters.total, parameters.active) == (46_702_792_704, 12_879_925_248)
    assert parameters.groups == {
        "embedding": 32000 * 4096,
        "attention": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024),
        "experts": 32 * 8 * 3 * 4096 * 14336,
        "router": 32 * 8 * 4096,
        "norms": 65 * 4096,
        "lm_head": 32000 * 4096,
    }


def test_mistral_7b_window_arithmetic() -> None:
    report = inspect_path(CONFIGS / "Mistral-7B-v0.1.json")
    field = report.receptive_field
    assert (field.exact, field.customary) == (32 * 4095 + 1, 32 * 4096)
    by_context = {use.context: use for use in report.kv}
    assert tuple(by_context) == CONTEXTS
    per_token = 2 * 32 * 8 * 128
    assert by_context[1024].windowed_fp16 == by_context[1024].full_fp16 == 1024 * per_token * 2
    assert by_context[131_072].windowed_fp16 == 4096 * per_token * 2 == 512 * 2**20
    assert by_context[131_072].full_fp32 == 131_072 * per_token * 4 == 32 * 2**30


@pytest.mark.parametrize(
    "windows, exact, customary",
    [((5, 5), 9, 10), ((1,), 1, 1), ((3, 7, 2), 10, 12), ((5, None), None, None), ((None,), None, None)],
)
def test_receptive_field(windows: tuple[int | None, ...], exact: int | None, customary: int | None) -> None:
    field = receptive_field(windows)
    assert (field.exact, field.customary) == (exact, customary)


def test_the_exact_receptive_field_is_what_the_model_shows(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=3, window=4)
    exact = inspect_path(folder).receptive_field.exact
    assert exact == 10
    model, ids = load_oracle(folder), torch.arange(3, 23)[None]
    changed = ids.clone()
    changed[0, 0] = 60
    with torch.no_grad():
        moved = (model(ids, use_cache=False).logits != model(changed, use_cache=False).logits).any(-1)[0]
    assert moved.nonzero().max().item() == exact - 1


def test_kv_of_mixed_layers() -> None:
    use = kv_use((4, None), num_kv_heads=2, head_dim=8, context=10)
    assert use.windowed_fp32 == (4 + 10) * 2 * 2 * 8 * 4
    assert use.full_fp16 == (10 + 10) * 2 * 2 * 8 * 2


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"tie": True, "dtype": "bfloat16", "shards": 3},
        {"architecture": "mixtral", "num_experts": 4, "top_k": 1},
        {"architecture": "mixtral", "expert_layout": "stacked"},
        {"architecture": "ministral", "layer_windows": [5, None]},
    ],
    ids=str,
)
def test_a_checkpoint_has_the_parameters_of_transformers(tmp_path: Path, case: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path, **case)
    report = inspect_path(folder)
    assert report.kind == "checkpoint"
    assert report.parameters.total == sum(parameter.numel() for parameter in load_oracle(folder).parameters())
    assert report.stored is not None
    assert report.stored.files == case.get("shards", 1)
    assert report.stored.bytes == report.parameters.total * (2 if case.get("dtype") == "bfloat16" else 4)
    assert sum(report.stored.dtypes.values()) == report.stored.tensors
    assert inspect_path(folder / "config.json").parameters == report.parameters


def test_unused_tensors_are_listed_with_the_reason(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.rotary_emb.inv_freq": torch.ones(4)}, file)
    report = inspect_path(folder)
    assert report.stored is not None
    assert list(report.stored.unused) == ["model.rotary_emb.inv_freq"]
    assert "follow from config.json" in drawn(report)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_path(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect_path(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="bert"):
        inspect_path(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "quux": 1}')
    assert inspect_path(tmp_path, ignore_config_keys=["quux"]).model.num_layers == 32


# ---------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_reports_are_json_and_fit_80_columns(path: Path) -> None:
    report = inspect_path(path, text_only=True)
    plain = report.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["parameters"]["total"] == report.parameters.total
    assert (plain["stored"], plain["bundle"]) == (None, None)
    assert f"{report.parameters.total:,}" in drawn(report)


def test_what_is_drawn_for_a_sliding_model() -> None:
    text = drawn(inspect_path(CONFIGS / "Mistral-7B-v0.1.json"))
    for words in ("7.24 B", "32 of 32 layers (0-31)", "131,041 tokens exactly, L·(W − 1) + 1", "131,072 tokens, L·W"):
        assert words in text
    assert "no window" in text


def test_what_is_drawn_for_experts_and_full_attention() -> None:
    text = drawn(inspect_path(CONFIGS / "Mixtral-8x7B.json"))
    for words in ("46.7 B", "12.9 B active per token", "8, of which each token visits 2", "unbounded", "experts"):
        assert words in text
    assert "no window" not in text


def test_what_is_drawn_for_mixed_windows_and_brackets_in_a_path(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "[red]", architecture="ministral", num_layers=5, layer_windows=[5, None, 5, 5, None]
    )
    text = drawn(inspect_path(folder))
    assert "[red]" in text
    assert "3 of 5 layers (0, 2-3)" in text
    assert "2 of 5 layers (1, 4)" in text
