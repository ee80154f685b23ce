"""The oracle that streams layer by layer is the model that holds all layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reference.checkpoint import open_checkpoint
from reference.model import QUERIES_AT_ONCE, Model
from reference.oracle import Oracle
from reference.rope import RotaryAngles
from reference.weights import bind, load_parameter
from tests.support.checkpoints import make_checkpoint


@pytest.mark.parametrize("options", [{}, {"architecture": "mixtral"}, {"tie": True, "window": None}])
def test_streaming_gives_the_bits_of_the_whole_model(tmp_path: Path, options: dict[str, object]) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, **options))  # type: ignore[arg-type]
    model = Model(checkpoint.config, device="meta", dtype=torch.float64)
    state = {name: load_parameter(checkpoint, source, torch.float64) for name, source in bind(checkpoint).items()}
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.rotary = RotaryAngles(checkpoint.config.rope, checkpoint.config.head_dim)  # a buffer, not in the state
    rows = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [5, 3, 5]]
    streamed = Oracle(checkpoint).logits(rows, torch.float64)
    with torch.no_grad():
        for row, logits in zip(rows, streamed, strict=True):
            assert torch.equal(model(torch.tensor([row]))[0], logits)


def test_progress_counts_layers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, num_layers=3))
    seen: list[tuple[str, int, int]] = []
    Oracle(checkpoint).logits([[1, 2]], torch.float32, lambda *step: seen.append(step))
    assert seen == [("reference in float32", done, 3) for done in (1, 2, 3)]


def test_a_row_longer_than_one_block_of_queries(tmp_path: Path) -> None:
    """The oracle attends in blocks of queries; the seam must not show against transformers."""
    from tests.support.checkpoints import load_oracle, oracle_logits

    folder = make_checkpoint(tmp_path, num_layers=1, window=9, max_position_embeddings=1024)
    ids = np.random.default_rng(0).integers(0, 64, QUERIES_AT_ONCE + 40)
    (ours,) = Oracle(open_checkpoint(folder)).logits([ids.tolist()], torch.float32)
    theirs = oracle_logits(load_oracle(folder), torch.from_numpy(ids)[None])[0]
    assert float((ours - theirs).abs().max()) < 2e-5
