"""Chunks come to a plan in a few widths only, and what fills them up changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from runtime import load
from runtime.tensorrt.widths import padded, padded_width
from tests.support.engine_doubles import embedded
from tests.support.plan_double import ContextDouble
from tests.support.toy_bundle import ToyModel, write_toy_bundle


def test_widths_are_powers_of_two_and_the_chunk() -> None:
    assert [padded_width(tokens, 12) for tokens in range(1, 13)] == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]
    assert [padded_width(tokens, 8) for tokens in (1, 5, 8)] == [1, 8, 8]
    assert padded_width(1, 1) == 1


def test_padding_is_zeros_on_the_right() -> None:
    array = np.array([[3, 4], [5, 6]])
    assert padded(array, 2) is array
    assert padded(array, 4).tolist() == [[3, 4, 0, 0], [5, 6, 0, 0]]


def test_a_plan_sees_few_shapes_and_the_logits_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyModel(windows=(4, None), chunk=11, context=64, seed=5)
    bundle = write_toy_bundle(tmp_path / "bundle", model)
    seen: dict[str, set[int]] = {"input_ids": set(), "logit_positions": set()}
    told = ContextDouble.set_shape

    def noting(self: ContextDouble, name: str, shape: Sequence[int]) -> None:
        if name in seen:
            seen[name].add(shape[1])
        told(self, name, shape)

    monkeypatch.setattr(ContextDouble, "set_shape", noting)
    ours, other = embedded(bundle).session, load(bundle, threads=1)
    rng = np.random.default_rng(0)
    for length in (3, 1, 5, 11, 7, 2, 17):  # 46 of the 64 that the full-attention layer holds
        row = rng.integers(0, model.vocab_size, length)
        assert np.array_equal(ours.forward(row), other.forward(row))
    assert np.array_equal(ours.forward_last([1, 2, 3]), other.forward_last([1, 2, 3]))
    assert seen["input_ids"] == {1, 2, 4, 8, 11}
    assert seen["logit_positions"] == {1, 2, 4, 8, 11}
