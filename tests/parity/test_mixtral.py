"""Engines of mixtures of experts: 4 and 8 experts, one to three of them chosen, every activation, both file layouts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import export
from tests.support.bundles import Exported, checkpoint, exported, shared_traces
from tests.support.parity import Judge, boundary_lengths, feed, largest_error, random_rows, uneven_feeds

# experts, chosen, activation, window, chunks
ROUTED: list[tuple[int, int, str, int | None, tuple[int, ...]]] = [
    (4, 1, "gelu", 5, (3, 5, 7)),
    (4, 2, "silu", 5, (3, 5, 7)),
    (4, 3, "quick_gelu", None, (4,)),
    (8, 1, "relu", 1, (1, 4)),
    (8, 2, "gelu_pytorch_tanh", 4, (4,)),
    (8, 3, "relu2", 3, (2, 3, 8)),
    (2, 2, "tanh", 5, (4,)),
    (1, 1, "sigmoid", 5, (4,)),
]

FILES: dict[str, dict[str, Any]] = {
    "stacked experts": {"expert_layout": "stacked"},
    "stacked experts, sharded, bfloat16": {"expert_layout": "stacked", "shards": 3, "dtype": "bfloat16"},
    "an expert per tensor, sharded, old config": {"shards": 4, "generation": "old", "dtype": "float16"},
}


@pytest.mark.parametrize("experts,top_k,activation,window,chunks", ROUTED)
def test_routed_models_at_the_borders_of_the_window(
    experts: int, top_k: int, activation: str, window: int | None, chunks: tuple[int, ...]
) -> None:
    settings: dict[str, Any] = {"num_experts": experts, "top_k": top_k, "activation": activation, "window": window}
    for chunk in chunks:
        context = 40 if window is None else None
        case = exported(chunk=chunk, context=context, architecture="mixtral", **settings)
        judge, session = Judge(case), case.session()
        lengths = boundary_lengths(window or 4, chunk)
        for length in lengths:
            judge.hold(session, random_rows([length], judge.vocab_size, seed=length), seed=chunk)
        session = case.session()
        judge.hold(session, random_rows(lengths[-3:], judge.vocab_size, seed=chunk), seed=length)


@pytest.mark.parametrize("name", FILES)
def test_however_the_experts_are_stored(name: str) -> None:
    case = exported(chunk=5, architecture="mixtral", **FILES[name])
    judge, session = Judge(case), case.session()
    judge.hold(session, random_rows([4, 11, 20], judge.vocab_size, seed=3), seed=4)


def test_equal_router_probabilities_go_to_the_lower_expert(tmp_path: Path) -> None:
    """With a router of zeros all experts tie at every token. transformers leaves open which ones it takes then."""
    source = shutil.copytree(checkpoint(architecture="mixtral"), tmp_path / "checkpoint")
    file = source / "model.safetensors"
    tensors = {name: t.zero_() if "gate.weight" in name else t for name, t in load_file(file).items()}
    assert sum(not bool(tensor.any()) for tensor in tensors.values()) == 2
    save_file(tensors, file, metadata={"format": "pt"})
    with shared_traces():
        case = Exported(source, export(source, tmp_path / "bundle", chunk=4))
    judge, session = Judge(case), case.session()
    rows = random_rows([20, 3], judge.vocab_size, seed=1)
    truth, allowed = judge.truth_and_budget(rows)
    assert largest_error(truth, feed(session, uneven_feeds(rows, 2))) <= allowed.allowed
    for name in tensors:
        if ".experts.0." in name or ".experts.1." in name:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    without, _ = Judge(case).truth_and_budget(rows)
    assert largest_error(truth, without) > 0.1, "the two lowest experts are the ones that were taken"
