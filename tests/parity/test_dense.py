"""Engines of dense models against the reference's truth and against transformers, at every border of the window."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.bundles import exported
from tests.support.parity import Judge, boundary_lengths, random_rows

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}

SLIDING: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    # name: window, chunks below, at and above it, checkpoint
    "gqa, odd window": (5, (1, 3, 5, 9), {}),
    "mqa, window of one, wide heads": (1, (1, 4), {"num_kv_heads": 1, "head_dim": 12, "activation": "sigmoid"}),
    "narrow heads, untied and deep": (2, (1, 2, 3), {"head_dim": 4, "num_layers": 5, "activation": "tanh"}),
    "linear RoPE": (6, (4, 6, 7), {"rope": {"rope_type": "linear", "factor": 4.0}, "activation": "gelu"}),
    "llama3 RoPE": (6, (4, 6, 7), {"rope": LLAMA3, "activation": "gelu_pytorch_tanh"}),
    "yarn RoPE, mha": (6, (4, 6, 7), {"rope": YARN, "num_kv_heads": 4, "activation": "quick_gelu", "tie": True}),
}

FULL: dict[str, tuple[int | None, dict[str, Any]]] = {
    # name: window of the layers that slide, checkpoint
    "mha, full attention, tied": (None, {"window": None, "num_kv_heads": 4, "tie": True, "activation": "relu"}),
    "ministral, layers of both kinds": (
        4,
        {"architecture": "ministral", "num_layers": 3, "layer_windows": [4, None, 4], "activation": "relu2"},
    ),
}

FILES: dict[str, dict[str, Any]] = {
    "sharded": {"shards": 3},
    "bfloat16, old config": {"dtype": "bfloat16", "generation": "old"},
    "float16, sharded": {"dtype": "float16", "shards": 2},
    "tokenizer and large vocabulary": {"tokenizer": True},
}


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_models_at_the_borders_of_the_window(name: str) -> None:
    window, chunks, settings = SLIDING[name]
    for chunk in chunks:
        case = exported(chunk=chunk, window=window, **settings)
        judge, session = Judge(case), case.session()
        lengths = boundary_lengths(window, chunk)
        for length in lengths:
            judge.hold(session, random_rows([length], judge.vocab_size, seed=length), seed=chunk)
        session = case.session()
        for three in (lengths[-3:], lengths[:1] + lengths[-2:], [1, lengths[-1], 2]):
            judge.hold(session, random_rows(three, judge.vocab_size, seed=chunk), seed=sum(three))


@pytest.mark.parametrize("chunk", [3, 4, 7])
@pytest.mark.parametrize("name", FULL)
def test_full_attention_up_to_the_last_position(name: str, chunk: int) -> None:
    window, settings = FULL[name]
    context = 40
    case = exported(chunk=chunk, context=context, **settings)
    judge, session = Judge(case), case.session()
    for length in (*boundary_lengths(window or 4, chunk), context):
        judge.hold(session, random_rows([length], judge.vocab_size, seed=length), seed=chunk)
    session = case.session()
    judge.hold(session, random_rows([context, 1, 13], judge.vocab_size, seed=1), seed=chunk)


@pytest.mark.parametrize("name", FILES)
def test_however_the_weights_are_stored(name: str) -> None:
    case = exported(chunk=5, **FILES[name])
    judge, session = Judge(case), case.session()
    judge.hold(session, random_rows([4, 11, 20], judge.vocab_size, seed=3), seed=4)


def test_far_past_the_window_token_by_token() -> None:
    case = exported(chunk=3)
    judge, session = Judge(case), case.session()
    rows = random_rows([100], judge.vocab_size, seed=5)
    judge.hold(session, rows, seed=6)
    judge.hold(session, [rows[0][:37]], seed=7)  # the same session again, after a reset
