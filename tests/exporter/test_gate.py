"""The gate's parts: what a suite feeds, where routers are undecided, seeds, rolls, and the same verdict each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from exporter.gate.feeding import logits_at
from exporter.gate.plan import MOST_TRUTH_BYTES, make_plan
from exporter.gate.routers import RouterLog, RouterSwap, undecided
from exporter.validate import validate
from exporter.validation_report import QUICK, ValidationReport
from runtime import Session, load
from runtime.errors import InputError
from tests.support.bundles import Exported, exported
from tests.support.planted import attribute, body_node, planted


@pytest.fixture(scope="module")
def case() -> Exported:
    return exported(window=5, num_layers=2, chunk=4)


@pytest.fixture(scope="module")
def session(case: Exported) -> Session:
    return load(case.bundle)


def names(report: ValidationReport) -> list[str]:
    return [check.name for check in report.checks]


def test_quick_is_bounded_by_the_size_of_the_model(session: Session) -> None:
    """Of a model of a billion parameters it feeds some dozens of tokens, and says which borders it leaves out."""
    rng = np.random.default_rng(0)
    plan = make_plan(session, (1024, 1024), 10**9, QUICK, rng)
    assert plan.lengths[-1] == len(plan.rows[0]) == 80
    assert plan.left_out == (1023, 1024, 1025, 2049, 3076)
    assert make_plan(session, (5, 5), 10**9, QUICK, rng).left_out == ()


def test_positions_of_long_rows_are_few_and_hold_the_borders(session: Session) -> None:
    rng = np.random.default_rng(0)
    large = make_plan(session, (200_000, None), 1, "full", rng)
    most = MOST_TRUTH_BYTES // 8 // session.manifest.model.vocab_size
    assert len(large.rows[0]) == 600_004
    assert sum(len(wanted) for wanted in large.wanted) < 1.1 * most
    assert {199_999, 200_000, 400_001 - 1, 600_003} <= set(large.wanted[0].tolist())


def test_an_unknown_suite_is_refused(case: Exported) -> None:
    with pytest.raises(InputError, match="no suite 'slow'"):
        validate(case.bundle, suite="slow")
    with pytest.raises(InputError, match="whole number from 0 on, not -1"):
        validate(case.bundle, seed=-1)


def test_every_check_runs_on_a_small_model(case: Exported) -> None:
    report = validate(case.bundle)
    assert report.passed
    assert all(check.passed for check in report.checks), report.checks
    assert {"reuse", "one thread", "seeded sampling", "greedy", "long roll", "declared windows"} <= set(names(report))
    assert {f"uneven pieces, split {number}" for number in (2, 3, 4)} <= set(names(report))
    assert report.distributions is not None
    assert len(report.distributions.kl) == len(report.position_errors) == len(report.positions) == 19
    assert max(report.distributions.kl) < 1e-8
    assert all(report.distributions.same_best)
    assert report.speed.prefill is not None
    assert report.speed.decode is not None
    assert report.peak_bytes > 1 << 20


def test_quick_runs_fewer(case: Exported) -> None:
    report = validate(case.bundle, suite=QUICK)
    assert report.passed
    assert "uneven pieces, split 2" not in names(report)
    assert [check.name for check in report.checks if check.passed is None] == ["long roll"]


def test_a_wider_window_is_seen_where_no_row_reaches_it(tmp_path: Path) -> None:
    """The suite quick feeds fewer tokens than the window has; the graph says what it would do."""
    case = exported(window=2000, num_layers=1, chunk=4)

    def widen(model: onnx.ModelProto) -> None:
        attribute(model, "RollingAttention", "window").i = 1999

    wrong = planted(case.bundle, tmp_path / "wrong", widen)
    report = validate(wrong, case.checkpoint, suite=QUICK)
    failed = [check for check in report.checks if check.passed is False]
    assert [check.name for check in failed] == ["declared windows"]
    assert "window 1,999 for window 2,000" in failed[0].detail


def other_mean(model: onnx.ModelProto) -> None:
    body_node(model, "RMSNorm", "ReduceMean").op_type = "ReduceSum"


def test_a_body_that_no_kernel_reads(case: Exported, tmp_path: Path) -> None:
    """It would run on a machine without kernels, under the same hash."""
    assert load(case.bundle).kernels
    wrong = planted(case.bundle, tmp_path / "wrong", other_mean)
    report = validate(wrong, case.checkpoint, suite=QUICK)
    assert [check.name for check in report.checks if check.passed is False] == ["portable bodies"]
    older = (wrong / "manifest.json").read_text().replace('"cierzo_version": "', '"cierzo_version": "0.0.1-')
    (wrong / "manifest.json").write_text(older)
    report = validate(wrong, case.checkpoint, suite=QUICK)
    assert report.passed
    assert "portable bodies" in [check.name for check in report.checks if check.passed is None]


def test_sampling_that_forgets_its_seed_fails(case: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, turn = Session.generate, iter(range(100))

    def forgetful(self: Session, prompt: object, **options: object) -> object:
        return honest(self, prompt, **options | {"seed": next(turn)})  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "generate", forgetful)
    report = validate(case.bundle, suite=QUICK)
    assert [check.name for check in report.checks if check.passed is False] == ["seeded sampling"]


@pytest.mark.parametrize(("turn", "name"), [(2, "reset"), (3, "reuse")])
def test_one_other_bit_after_a_reset_fails(
    case: Exported, monkeypatch: pytest.MonkeyPatch, turn: int, name: str
) -> None:
    calls: list[object] = []

    def remembering(*arguments: Any) -> Any:
        calls.append(arguments)
        logits_RV = logits_at(*arguments)
        return np.nextafter(logits_RV, np.float32(np.inf)) if len(calls) == turn else logits_RV

    monkeypatch.setattr("exporter.gate.checks_state.logits_at", remembering)
    report = validate(case.bundle, suite=QUICK)
    assert [check.name for check in report.checks if check.passed is False] == [name]


class Routed(nn.Module):
    """Stands for a layer of which only the router matters."""

    is_moe = True

    def __init__(self) -> None:
        super().__init__()
        self.moe = Mixture()


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 4, bias=False)
        self.router.weight = nn.Parameter(torch.eye(4))


LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.99, 0.0], [1.99, 0.0, 3.0, 2.0]])


@torch.no_grad()
def test_undecided_tokens_are_found_and_sent_the_other_way() -> None:
    logs = (RouterLog(), RouterLog())
    for log, noise in zip(logs, (0.0, 0.005), strict=True):
        layer = Routed()
        log(0, layer)  # type: ignore[arg-type]
        layer.moe.router(LOGITS + noise)
    found = undecided(*logs, top_k=2, lengths=[3])
    assert found.margins == pytest.approx((0.02,), rel=1e-3)
    assert found.first == (1,)
    layer = Routed()
    RouterSwap(found.margins, 2)(0, layer)  # type: ignore[arg-type]
    chosen = layer.moe.router(LOGITS).sort(descending=True).indices[:, :2]
    assert chosen.tolist() == [[0, 1], [0, 2], [2, 0]]


@torch.no_grad()
def test_layers_without_routers_are_left_alone() -> None:
    log = RouterLog()
    layer = Routed()
    layer.is_moe = False
    log(0, layer)  # type: ignore[arg-type]
    RouterSwap((1.0,), 2)(0, layer)  # type: ignore[arg-type]
    layer.moe.router(LOGITS)
    assert log.logits == {0: []}
