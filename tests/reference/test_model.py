"""The reference model against transformers: another reading of the same files by other people."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import reference.model
from reference.attention import attend, repeat_heads, visible_pairs
from reference.checkpoint import open_checkpoint
from reference.model import Model
from reference.norm import RMSNorm
from reference.oracle import Oracle
from reference.parity import budget
from tests.support.bundles import checkpoint
from tests.support.checkpoints import load_oracle, oracle_logits
from tests.support.parity import fill, largest_error

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 16}

SCALED = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 7}

CASES: list[dict[str, Any]] = [
    {},
    {"window": None, "num_kv_heads": 4, "tie": True},
    {"window": 1, "num_kv_heads": 1, "head_dim": 12},
    {"window": 40, "head_dim": 4, "num_layers": 4, "rope_theta": 1e6},
    {"architecture": "ministral", "num_layers": 3, "layer_windows": [4, None, 4]},
    {"rope": {"rope_type": "linear", "factor": 4.0}, "generation": "old"},
    {"rope": LLAMA3 | STRETCHED},
    {"rope": {"rope_type": "yarn"} | STRETCHED},
    {"shards": 3, "dtype": "bfloat16", "generation": "old"},
    *({"activation": name} for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2")),
    *({"activation": name} for name in ("swish", "sigmoid", "tanh")),
    *(
        {"architecture": "mixtral", "num_experts": experts, "top_k": top_k}
        for experts, top_k in ((1, 1), (4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3), (8, 8))
    ),
    {"architecture": "mixtral", "window": None, "expert_layout": "stacked", "activation": "gelu"},
    {"architecture": "mixtral", "dtype": "float16", "shards": 3, "tie": True, "activation": "relu2"},
    {"architecture": "llama", "attention_bias": True, "mlp_bias": True, "rope": LLAMA3 | STRETCHED},
    {"architecture": "llama", "num_kv_heads": 4, "rope": {"rope_type": "dynamic", "factor": 2.0}, "tie": True},
    {"architecture": "qwen2", "num_layers": 3, "layer_windows": [None, 4, None], "generation": "old", "tie": True},
    {"architecture": "qwen3", "attention_bias": True, "layer_windows": [3, None], "head_dim": 12},
    {"architecture": "qwen3", "window": None, "tie": True, "shards": 3, "dtype": "bfloat16"},
    {"architecture": "qwen3_moe", "num_experts": 8, "top_k": 3, "window": None},
    {"architecture": "qwen3_moe", "attention_bias": True, "expert_layout": "stacked", "tie": True, "shards": 2},
    {"architecture": "phi3", "window": 3, "activation": "gelu"},
    {"architecture": "phi3", "num_kv_heads": 1, "window": None, "head_dim": 6, "tie": True},
    {"architecture": "ministral3", "window": None},
    {"architecture": "ministral3", "rope": SCALED, "tie": True},
    {"architecture": "ministral3", "rope": SCALED | {"rope_type": "yarn", "factor": 4.0}, "generation": "old"},
]


def model_of(settings: dict[str, Any], dtype: torch.dtype) -> Model:
    opened = open_checkpoint(checkpoint(**settings))
    return fill(Model(opened.config, device="meta", dtype=dtype), opened, dtype)


def tokens(batch: int, length: int, vocab_size: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_logits_are_those_of_transformers(settings: dict[str, Any]) -> None:
    """Ours in float64 is the truth. Ours and theirs in float32 must err alike, and theirs in float64 nearly agree."""
    ids = tokens(2, 45)
    folder = checkpoint(**settings)
    theirs, theirs_wide = (
        list(oracle_logits(load_oracle(folder, dtype), ids).numpy()) for dtype in (torch.float32, torch.float64)
    )
    ours, truth = (list(model_of(settings, dtype)(ids).numpy()) for dtype in (torch.float32, torch.float64))
    assert (ours[0].dtype, truth[0].dtype) == (np.float32, np.float64)
    allowed = budget(truth, ours, "float32")
    assert allowed.reference_error <= 64 * allowed.tolerance.eps * allowed.largest_logit
    assert largest_error(truth, theirs) <= allowed.allowed
    assert largest_error(truth, theirs_wide) <= allowed.allowed, "transformers keeps some of float64 in float32"
    assert largest_error(theirs, ours) <= allowed.allowed


@pytest.mark.parametrize("settings", [{}, {"architecture": "mixtral"}, {"tie": True}], ids=str)
def test_layer_by_layer_is_the_same_model(settings: dict[str, Any]) -> None:
    ids = tokens(1, 30)
    for dtype in (torch.float32, torch.float64):
        (logits,) = Oracle(open_checkpoint(checkpoint(**settings))).logits(ids.tolist(), dtype)
        assert torch.equal(logits, model_of(settings, dtype)(ids)[0])


def test_rows_do_not_touch_each_other_and_nobody_sees_ahead() -> None:
    model = model_of({"architecture": "mixtral"}, torch.float64)
    ids = tokens(3, 20)
    together = model(ids)
    for row in range(3):
        assert torch.allclose(model(ids[row : row + 1])[0], together[row], rtol=0, atol=1e-12)
    assert torch.allclose(model(ids[:, :9]), together[:, :9], rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 7, 45])
def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    ids = tokens(2, 45)
    model = model_of({}, torch.float64)
    whole = model(ids)
    monkeypatch.setattr(reference.model, "QUERIES_AT_ONCE", at_once)
    assert torch.allclose(model(ids), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 5, None])
def test_visible_pairs_spelled_out(window: int | None) -> None:
    query, key = torch.tensor([[3, 4, 9]]), torch.tensor([[-1, 0, 1, 2, 3, 4, 5, 9]])
    visible = visible_pairs(query, key, window)
    assert visible.shape == (1, 1, 3, 8)
    for i, at in enumerate(query[0].tolist()):
        for j, seen in enumerate(key[0].tolist()):
            expected = seen >= 0 and 0 <= at - seen < (window or 10**9)
            assert bool(visible[0, 0, i, j]) == expected, (at, seen)


def test_query_heads_share_neighbouring_key_heads() -> None:
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    assert torch.equal(repeat_heads(x, 4), x.repeat_interleave(4, dim=1))
    assert repeat_heads(x, 1) is x


def test_hidden_keys_weigh_exactly_nothing_and_a_blind_row_stays_finite() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 3, 4, generator=generator) for _ in range(3))
    visible = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)[None, None]
    seen = attend(query, key, value, visible, 0.5)
    value[:, :, 2] = 1e30
    key[:, :, 2] = -7.0
    assert torch.equal(attend(query, key, value, visible, 0.5)[:, :, :2], seen[:, :, :2])
    assert torch.equal(seen[:, :, 0], value[:, :, 0])
    assert bool(seen.isfinite().all())


def test_norm_takes_its_mean_in_float32() -> None:
    norm = RMSNorm(8, 1e-5)
    torch.nn.init.ones_(norm.weight)
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # 300² does not fit into float16
    assert torch.equal(norm.to(torch.float16)(x), torch.ones(1, 8, dtype=torch.float16))


@pytest.mark.parametrize("experts,top_k", [(1, 1), (4, 1), (4, 3), (8, 2)])
def test_both_spellings_of_the_mixture_are_one_function(experts: int, top_k: int) -> None:
    model = model_of({"architecture": "mixtral", "num_experts": experts, "top_k": top_k}, torch.float64)
    moe: Any = model.layers[0].moe
    x = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(moe(x), moe.forward_dense(x), rtol=0, atol=1e-12)
    weight, expert = moe.route(x)
    assert torch.allclose(weight.sum(-1), torch.ones(50, dtype=torch.float64))
    assert {len(set(row)) for row in expert.tolist()} == {top_k}


def test_the_router_breaks_ties_to_the_lower_expert() -> None:
    model = model_of({"architecture": "mixtral", "num_experts": 8, "top_k": 3}, torch.float32)
    moe: Any = model.layers[0].moe
    moe.router.weight = torch.nn.Parameter(torch.zeros(8, 32), requires_grad=False)
    weight, expert = moe.route(torch.randn(4, 32))
    assert expert.tolist() == [[0, 1, 2]] * 4
    assert torch.allclose(weight, torch.full((4, 3), 1 / 3))
