"""Every form that weights can have: engines past the window against transformers, which gets the weights as numbers.

Quantised engines are within their budget of the quantised model, and near the original one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.quality import MOST_KL, divergence
from reference.parity import position_errors
from runtime.kernels import kernels
from tests.support.bundles import Exported, exported
from tests.support.checkpoints import load_oracle, oracle_logits
from tests.support.parity import Judge, feed, largest_error, random_rows

WINDOW, CHUNK = 5, 4

FORMATS: dict[str, dict[str, Any]] = {
    # name: options of the export
    "stored": {},
    "fp32": {"weights": "fp32"},
    "int8": {"weights": "int8"},
    "int8, blocks of 128, zero points": {"weights": "int8", "block_size": 128, "zero_points": True},
    "int4": {"weights": "int4"},
    "int4, zero points": {"weights": "int4", "zero_points": True},
    "int4, blocks of 128": {"weights": "int4", "block_size": 128},
    "int4, blocks of 128, zero points": {"weights": "int4", "block_size": 128, "zero_points": True},
    "int4, rounded to nearest, float32 scales": {"weights": "int4", "quantizer": "rtn", "scales": "float32"},
    "int4, rings of int8": {"weights": "int4", "kv": "int8"},
    "int4, head in int8, first layer as stored": {"weights": "int4", "keep": ("lm_head=int8", "first")},
}

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"dtype": "bfloat16", "hidden_size": 96, "intermediate_size": 160, "num_heads": 4, "head_dim": 24},
    "tied, biases": {"dtype": "float16", "architecture": "qwen3", "attention_bias": True, "tie": True},
    "mixture of experts": {"dtype": "bfloat16", "architecture": "mixtral", "intermediate_size": 40},
}
"""Widths that no block divides, one that is several blocks, and stacks whose rows are shorter than a block."""

NATIVE = [True, False] if kernels() is not None else [False]


def case_of(model: str, weights: str) -> Exported:
    return exported(chunk=CHUNK, window=WINDOW, options=FORMATS[weights], **MODELS[model])


@pytest.mark.parametrize("native", NATIVE, ids=lambda native: "kernels" if native else "bodies")
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_engines_past_the_window(model: str, weights: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("CIERZO_KERNELS", "off")
    case = case_of(model, weights)
    judge, session = Judge(case), case.session()
    assert bool(session.kernels) == native
    quantized = FORMATS[weights].get("weights") in MOST_KL
    assert any(op.startswith("Quantized") for op in session.kernels) == (quantized and native)
    rows = random_rows([3 * WINDOW + CHUNK, WINDOW, WINDOW + 1], judge.vocab_size, seed=1)
    judge.hold(session, rows, seed=2)
    original = oracle_logits(load_oracle(case.checkpoint), torch.tensor([rows[0]]))[0].numpy()
    (logits,) = feed(case.session(), [rows[:1]])
    if not quantized:
        assert position_errors(original, logits).max() < 1e-4 * np.abs(original).max()
        return
    assert 0 < divergence(original, logits).mean() < MOST_KL[FORMATS[weights]["weights"]]


def test_blocks_and_bits_are_worth_what_they_cost() -> None:
    """KL on one text: eight bits are far better than four, and both are no small share of what is allowed."""
    found = {}
    for weights in ("int4", "int8"):
        case = case_of("dense", weights)
        rows = random_rows([60], case.opened().config.vocab_size, seed=3)
        original = oracle_logits(load_oracle(case.checkpoint), torch.tensor(rows))[0].numpy()
        (logits,) = feed(case.session(), [rows])
        found[weights] = float(divergence(original, logits).mean())
    assert 10 * found["int8"] < found["int4"]


_RUN = """
import sys
import numpy as np
from runtime import load
from runtime.kernels import kernels
session = load(sys.argv[1], threads=1)
assert (kernels() is None) == (sys.argv[3] == "off") == (session.kernels == ())
rows = np.load(sys.argv[2])
np.save(sys.argv[2].replace("rows", sys.argv[3]), session.forward(rows)[0])
"""


def test_a_process_without_kernels_computes_the_same_function(tmp_path: Path) -> None:
    case = case_of("mixture of experts", "int4, rings of int8")
    judge = Judge(case)
    rows = random_rows([3 * WINDOW + CHUNK], judge.vocab_size, seed=4)
    np.save(tmp_path / "rows.npy", np.array(rows))
    truth, allowed = judge.truth_and_budget(rows)
    for switch in ("", "off") if kernels() is not None else ("off",):
        arguments = [sys.executable, "-c", _RUN, str(case.bundle), str(tmp_path / "rows.npy"), switch or "on"]
        done = subprocess.run(
            arguments, env={**os.environ, "CIERZO_KERNELS": switch}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        logits = np.load(tmp_path / f"{switch or 'on'}.npy")
        assert largest_error(truth, [logits]) <= allowed.allowed
        assert largest_error(judge.transformers(rows), [logits]) <= allowed.allowed
