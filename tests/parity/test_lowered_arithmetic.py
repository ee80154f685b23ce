"""The graph that engines are built from, run past the window: in float16, bfloat16 and float32 against transformers.

The budget is the one for an engine that computes in that type: a multiple of what the reference loses in it.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.bundles import exported
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
    "biases, tied": {"architecture": "qwen2", "dtype": "float16", "tie": True},
}


@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_lowered_graphs_past_the_window(model: str, arithmetic: str) -> None:
    case = exported(chunk=CHUNK, **{"window": WINDOW, **MODELS[model]})
    judge, session = Judge(case, arithmetic=arithmetic), lowered_session(case, arithmetic)
    rows = random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=1)
    judge.hold(session, rows, seed=2)


def test_rings_of_eight_bits() -> None:
    case = exported(chunk=CHUNK, window=WINDOW, dtype="bfloat16")
    judge, session = Judge(case, "bfloat16", "float8"), lowered_session(case, "bfloat16", "float8")
    judge.hold(session, random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=1), seed=2)
