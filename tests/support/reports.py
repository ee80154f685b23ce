"""Reports of validations as they could be, made by hand: right, wrong, empty, and with texts that want escaping."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from exporter.layer_report import LayerReport, ModuleParity
from exporter.validation_report import Check, Distributions, Quality, Speed, ValidationReport

BUDGET = 4e-6
TOKENS = 40


def report(**changes: Any) -> ValidationReport:
    """A run that passes, with everything that a report can hold; `changes` replace fields."""
    errors = tuple(1e-6 + 5e-7 * math.sin(position) for position in range(TOKENS))
    made = ValidationReport(
        bundle="folder/model.cierzo",
        checkpoint="folder/model",
        backend="onnxruntime",
        dtype="float32",
        seed=3,
        budget=BUDGET,
        reference_error=1e-6,
        largest_logit=2.0,
        reason="the engine adds in another order",
        checks=(
            Check("prompt of 8", True, "whole prompt, all positions", 1e-6, seconds=0.25),
            Check("uneven pieces", True, "7 feeds of random sizes around 4", 1.5e-6, budget=3e-6, seconds=0.5),
            Check("reset", True, "the same bits", seconds=0.1),
            Check("ragged batch", None, "the bundle was exported for 1 row"),
        ),
        position_errors=errors,
        versions={"onnxruntime": "1.31.0", "torch": "2.13.0"},
        quality=Quality("sample.txt", 512, 0.012, 0.98, 1.01),
        unverified=("model.safetensors",),
        suite="quick",
        engine="tensorrt-1",
        device="cpu",
        windows=(8, 8),
        chunk=4,
        seconds=1.5,
        peak_bytes=3 << 30,
        speed=Speed(1234.5, 67.8),
        distributions=Distributions(
            kl=tuple(1e-12 * (position + 1) for position in range(TOKENS)),
            same_best=(True,) * TOKENS,
            margin=(0.5,) * TOKENS,
        ),
    )
    return replace(made, **changes)


def failing() -> ValidationReport:
    """A run with a check beyond its budget, values that are not finite, and best tokens that differ."""
    good = report()
    assert good.distributions is not None
    errors = (*good.position_errors[:-2], 5e-3, float("inf"))
    checks = (
        *good.checks,
        Check("one at a time", False, "over budget first at position 38", 5e-3, seconds=0.1),
        Check("last tokens", False, "over budget first at position 39", float("inf")),
    )
    same = (True, False, False, *(True,) * (TOKENS - 3))
    margin = (0.5, BUDGET, 0.5, *(0.5,) * (TOKENS - 3))
    kl = (0.0, -1e-17, *good.distributions.kl[2:-1], float("inf"))
    return replace(
        good, checks=checks, position_errors=errors, distributions=Distributions(kl, same, margin), quality=None
    )


def layers(*, passed: bool = True) -> LayerReport:
    """A comparison by module: an embedding, one layer and a head."""
    error = 1e-7 if passed else float("inf")
    modules = (
        ModuleParity("embed_tokens", 0, 0.0, 1e-6, 0.0, 1.0, True),
        ModuleParity("layers.0.self_attn.o_proj", 1, error, 1e-6, 1e-7, 1.0, passed),
        ModuleParity("lm_head", -1, 1e-7, 1e-6, 1e-7, 1.0, True),
    )
    return LayerReport(modules, ("layers.0.moe",), TOKENS, TOKENS, 1, 4, (8,), "float32")


def empty() -> ValidationReport:
    """A run in which nothing was compared."""
    return report(checks=(), position_errors=(), distributions=None, quality=None, unverified=())
