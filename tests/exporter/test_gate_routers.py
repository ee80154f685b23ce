"""What an engine may be off by where a router is undecided: before such a token, and from it on."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporter.gate.checks_reach import undecided_routers
from exporter.gate.routers import Undecided
from exporter.gate.truth import Truth, _allowed, make_truth
from reference.config import MoEConfig
from reference.parity import TOLERANCES, Budget
from reference.rounding import Rounding
from runtime.errors import CheckpointError

FP16 = TOLERANCES["float16"]
VOCABULARY = 3


def test_there_is_more_room_from_the_first_undecided_token_on() -> None:
    near = Undecided((0.1,), (frozenset({2, 4}), frozenset()), (2, 3))
    costs = [np.array([9.0, 9.0, 5.0, 0.1, 7.0, 0.5]), np.array([9.0, 9.0, 9.0])]
    found = _allowed(costs, [np.arange(6), np.arange(3)], near, Budget(1.0, 0.25, 50.0, FP16))
    room = FP16.multiple * 7.0
    assert found[0].tolist() == [1.0, 1.0, room, room, room, room]
    assert found[1].tolist() == [1.0, 1.0, 1.0]
    (never_less,) = _allowed([np.full(2, 0.01)], [np.arange(2)], Undecided((1.0,), (frozenset({0}),), (0,)),
                             Budget(1.0, 0.25, 50.0, FP16))  # fmt: skip
    assert never_less.tolist() == [1.0, 1.0]


class Layer(nn.Module):
    """Only its router matters."""

    is_moe = True

    def __init__(self) -> None:
        super().__init__()
        router = nn.Linear(3, 3, bias=False)
        router.weight = nn.Parameter(torch.eye(3))
        self.moe = nn.Module()
        self.moe.add_module("router", router)


class Model:
    """Stands for the reference: routers that get `gaps` between the best two experts, and errors of its logits.

    runs: truth, in the engine's type, and with undecided tokens sent the other way.
    """

    def __init__(self, gaps: Sequence[float], own: Sequence[float], swapped: Sequence[float]) -> None:
        self.gaps, self.errors = gaps, [np.zeros(len(gaps)), np.array(own), np.array(swapped)]

    @torch.no_grad()
    def logits(self, rows: Any, dtype: torch.dtype, progress: object, *, on_layer: Any, **_: Any) -> list[Tensor]:
        layer: Any = Layer()
        rounded = dtype != torch.float64
        on_layer(0, layer)
        layer.moe.router(torch.tensor([[1 + gap + 0.001 * rounded, 1.0, 0.0] for gap in self.gaps]))
        errors = self.errors.pop(0)
        return [torch.tensor(np.full((len(errors), VOCABULARY), 10.0) + errors[:, None], dtype=dtype)]


def truth_of(gaps: Sequence[float], own: Sequence[float], swapped: Sequence[float]) -> Truth:
    rows = [np.zeros(len(gaps), np.int64)]
    moe = MoEConfig(num_experts=3, top_k=1)
    model: Any = Model(gaps, own, swapped)
    wanted = [np.arange(len(gaps))]
    return make_truth(
        model, rows, wanted, moe=moe, arithmetic="float32", rounding=Rounding(), dtype="float16", progress=None
    )


def test_an_expert_that_the_reference_takes_is_no_rounding() -> None:
    """The budget of settled tokens does not grow with what an undecided one costs."""
    truth = truth_of([1.0, 1.0, 0.002, 1.0], [0.01, 0.02, 3.0, 0.1], [0.0, 0.0, 2.0, 0.2])
    assert truth.budget.reference_error == pytest.approx(0.02, rel=1e-3)
    assert truth.rows[0].undecided == 2
    assert truth.rows[0].allowed_R == pytest.approx([0.08, 0.08, 12.0, 12.0], rel=1e-3)


def test_a_row_that_is_undecided_from_its_first_token() -> None:
    """What rounding costs is then what it usually costs, and nowhere less than it did."""
    truth = truth_of([0.002, 1.0, 1.0, 1.0], [0.5, 0.02, 0.03, 0.04], [2.0, 0.0, 0.0, 0.0])
    assert truth.budget.reference_error == pytest.approx(0.03, rel=1e-2)
    assert truth.rows[0].allowed_R == pytest.approx([8.0, 8.0, 8.0, 8.0], rel=1e-2)


def test_rows_that_are_held_less_tightly_are_named() -> None:
    for own, said in (([0.01, 0.02, 3.0, 0.1], ["2 of 4 tokens"]), ([0.01, 0.02], [])):
        gaps = [1.0, 1.0, 0.002, 1.0][: len(own)]
        run: Any = SimpleNamespace(truth=truth_of(gaps, own, [0.0, 0.0, 2.0, 0.2]))
        found = list(undecided_routers(run))
        assert [check.passed for check in found] == [None] * len(said)
        assert all(text in check.detail for check, text in zip(found, said, strict=True))


def test_decided_routers_cost_nothing() -> None:
    truth = truth_of([1.0, 1.0], [0.01, 0.02], [])
    assert truth.rows[0].undecided == 2
    assert truth.rows[0].allowed_R == pytest.approx([0.08, 0.08], rel=1e-3)


def test_an_expert_of_damaged_weights_gives_no_room() -> None:
    with pytest.raises(CheckpointError, match="infinite or not a number"):
        truth_of([1.0, 0.002], [0.01, 0.02], [0.0, np.inf])
