"""Fifty right bundles, each of its own weights and with its own tokens: the gate refuses none."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.validate import validate
from tests.support.bundles import exported

MODELS: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "no window": {"window": None, "context": 24},
    "windows by layer": {"architecture": "ministral", "layer_windows": (5, None, 5), "num_layers": 3, "context": 24},
    "head dim of its own": {"window": 7, "head_dim": 24, "dtype": "bfloat16"},
    "mixture": {"architecture": "mixtral", "window": 5, "dtype": "bfloat16"},
    "stacked experts": {"architecture": "qwen3_moe", "window": None, "context": 24, "num_experts": 8},
    "rings of float16": {"window": 5, "dtype": "float16", "options": {"kv": "float16"}},
    "mixture, rings of float16": {"architecture": "mixtral", "window": 5, "options": {"kv": "float16"}},
    "int4": {"window": 5, "dtype": "bfloat16", "options": {"weights": "int4"}},
    "int8, rings of int8": {"window": 5, "options": {"weights": "int8", "kv": "int8"}},
}
RUNS = 50


@pytest.mark.parametrize("number", range(RUNS))
def test_a_right_bundle_is_let_through(number: int) -> None:
    model = list(MODELS)[number % len(MODELS)]
    report = validate(exported(seed=100 + number, **MODELS[model]).bundle, seed=number)
    failed = [(check.name, check.error, check.budget, check.detail) for check in report.checks if check.passed is False]
    assert report.passed, (model, report.budget, failed)
