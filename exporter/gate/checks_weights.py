"""Quantised weights beside those that they were made from, matrix by matrix: no text need show what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from exporter.validation_report import Check
from reference.oracle import Load, Oracle

MOST_OFF = 0.5
"""‖q − w‖ / ‖w‖ of a row at most. Rounding to 4 bits costs about 0.1; another row's weights make 1.4 of it."""

SMALL = 0.01
"""A row shorter than this share of its matrix's typical row is held as if it were that long."""

Progress = Callable[[str, int, int], None]

READING = "comparing quantised weights"
"""The stage of `progress`, in matrices."""


def quantized_weights(weights: Mapping[str, Load], original: Oracle, progress: Progress | None = None) -> Check:
    """Hold every row of every quantised matrix against the checkpoint's. weights: what they stand for."""
    worst, where = 0.0, ""
    for number, (name, load) in enumerate(weights.items(), start=1):
        off = _off(load(torch.float32), original.parameter(name, torch.float32))
        if not off <= worst:
            worst, where = off, name
        if progress is not None:
            progress(READING, number, len(weights))
    held = worst <= MOST_OFF
    far = f"a row of {where} is off by {100 * worst:.2g} % of its length"
    detail = f"{len(weights)} matrices beside the checkpoint's: at most {far.removeprefix('a row of ')}"
    return Check("quantised weights", held, detail if held else f"{far}, which no rounding does")


def _off(numbers: Tensor, original: Tensor) -> float:
    """The largest ‖q − w‖ / ‖w‖ of a row; infinite where it is no number."""
    shape = numbers.shape[-1]
    length = original.reshape(-1, shape).norm(dim=-1)
    gap = (numbers.reshape(-1, shape) - original.reshape(-1, shape)).norm(dim=-1)
    least = SMALL * float(length.square().mean().sqrt())
    if not bool(torch.isfinite(gap).all()):
        return float("inf")
    return float((gap / length.clamp(min=max(least, torch.finfo(torch.float32).tiny))).max())
