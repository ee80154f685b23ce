"""The graph that engines are built from, run past the window: in float16, bfloat16 and float32 against transformers.

The budget is the one for an engine that computes in that type: a multiple of what the reference loses in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from exporter.compile import export
from tests.support.bundles import Exported, exported, shared_traces
from tests.support.checkpoints import make_checkpoint
from tests.support.lowered import lowered_session
from tests.support.parity import Judge, boundary_lengths, random_rows

WINDOW, CHUNK = 5, 4

MODELS: dict[str, dict[str, Any]] = {
    "window": {"dtype": "bfloat16"},
    "no window": {"dtype": "bfloat16", "window": None, "context": 40},
    "heads wider than the hidden states": {"dtype": "float16", "head_dim": 24, "num_heads": 6, "num_kv_heads": 2},
    "windows by layer": {"architecture": "ministral", "layer_windows": (5, None, 5), "num_layers": 3, "context": 40},
    "mixture of experts": {"architecture": "mixtral", "dtype": "bfloat16"},
    "mixture, stacked experts": {"architecture": "qwen3_moe", "dtype": "bfloat16"},
    "queries scaled by their positions": {"architecture": "ministral3", "dtype": "bfloat16"},
    "biases, tied": {"architecture": "qwen2", "dtype": "float16", "tie": True},
}


@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_lowered_graphs_past_the_window(model: str, arithmetic: str) -> None:
    case = exported(chunk=CHUNK, **{"window": WINDOW, **MODELS[model]})
    judge, session = Judge(case, arithmetic=arithmetic), lowered_session(case, arithmetic)
    rows = random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=6)
    judge.hold(session, rows, seed=2)


def test_rings_of_eight_bits() -> None:
    case = exported(chunk=CHUNK, window=WINDOW, dtype="bfloat16")
    judge, session = Judge(case, "bfloat16", "float8"), lowered_session(case, "bfloat16", "float8")
    judge.hold(session, random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=1), seed=2)


def test_values_that_a_ring_of_eight_bits_cannot_hold_show(tmp_path: Path) -> None:
    """Clipped to the largest number, they would give logits that look like any others."""
    source = make_checkpoint(tmp_path / "large", dtype="bfloat16", window=WINDOW)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][0] *= 2e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with shared_traces():
        case = Exported(source, export(source, tmp_path / "bundle", chunk=CHUNK, prove=False))
    row = [[1, 2, 3, 4, 5]]
    assert np.isfinite(lowered_session(case, "bfloat16", "bfloat16").forward(row)).all()
    assert np.isnan(lowered_session(case, "bfloat16", "float8").forward(row)).all()
