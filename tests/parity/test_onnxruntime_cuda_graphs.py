"""The graphs of engines for ONNX Runtime on CUDA, run past the window: in three types against transformers.

On the CPU provider, by the runtime's own engine: its rings, scratch memory, weights and steps. The budget is the one
for an engine that computes in that type.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.test_lowered_arithmetic import CHUNK, MODELS, WINDOW
from tests.support.bundles import exported
from tests.support.parity import Judge, boundary_lengths, random_rows
from tests.support.step_engines import step_session

QUANTISED: dict[str, dict[str, Any]] = {
    "int4": {"options": {"weights": "int4", "block_size": 16}},
    "int4 with zero points": {"options": {"weights": "int4", "block_size": 16, "zero_points": True}},
    "int8": {"options": {"weights": "int8", "block_size": 16}},
    "int4 mixture of experts": {
        "architecture": "mixtral",
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 64,
        "options": {"weights": "int4", "block_size": 32},
    },
}
WIDER_THAN_THE_WINDOW = 12


@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_both_graphs_past_the_window(model: str, arithmetic: str) -> None:
    case = exported(chunk=CHUNK, **{"window": WINDOW, **MODELS[model]})
    judge, session = Judge(case, arithmetic=arithmetic), step_session(case, arithmetic)
    rows = random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=6)
    judge.hold(session, rows, seed=2)


@pytest.mark.parametrize("model", QUANTISED)
def test_quantised_graphs_past_the_window(model: str) -> None:
    case = exported(chunk=CHUNK, dtype="bfloat16", **{"window": WINDOW, **QUANTISED[model]})
    judge, session = Judge(case, arithmetic="float16"), step_session(case, "float16")
    judge.hold(session, random_rows([19, 7, 5], judge.vocab_size, seed=3), seed=4)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_steps_wider_than_the_window(arithmetic: str) -> None:
    case = exported(chunk=WIDER_THAN_THE_WINDOW, window=WINDOW, dtype="bfloat16")
    judge, session = Judge(case, arithmetic=arithmetic), step_session(case, arithmetic)
    judge.hold(session, random_rows([29, 12, 6, 1], judge.vocab_size, seed=8), seed=9)
