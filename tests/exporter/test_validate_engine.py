"""`validate` of a built engine: judged by what it computes in, whatever the bundle's graph would."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.validate import validate
from exporter.validation_report import SUITES
from runtime import Session
from runtime.sampling import Candidates
from tests.support.bundles import exported
from tests.support.engine_doubles import ROLLING, weightless
from tests.support.step_engines import step_session


@pytest.mark.parametrize("plugins", [ROLLING, ()], ids=["in place", "turning"])
@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
def test_an_engine_is_judged_by_its_own_arithmetic(
    monkeypatch: pytest.MonkeyPatch, arithmetic: str, plugins: tuple[str, ...]
) -> None:
    case = exported(dtype="bfloat16")
    seen: list[Any] = []

    def load(bundle: Any, **options: Any) -> Session:
        seen.append((bundle, options["backend"], options["engine"]))
        return weightless(case.bundle, arithmetic=arithmetic, plugins=plugins).session

    monkeypatch.setattr("exporter.gate.run.load", load)
    report = validate(case.bundle, backend="tensorrt", engine="one")
    assert seen == [(case.bundle, "tensorrt", "one")]
    assert [check for check in report.checks if check.passed is False] == []
    assert report.passed
    assert any(check.name == "highest logits" for check in report.checks)
    assert (report.dtype, report.backend) == (arithmetic, "tensorrt")
    assert report.position_errors
    assert (max(report.position_errors) > 1e-5) == (arithmetic == "float16")


STEPS: dict[str, dict[str, Any]] = {
    "window": {"window": 5, "dtype": "bfloat16"},
    "no window": {"window": None, "context": 24, "dtype": "float16"},
    "windows by layer": {"architecture": "ministral", "layer_windows": (5, None, 5), "num_layers": 3, "context": 24},
    "mixture": {"architecture": "mixtral", "window": 5, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", STEPS)
def test_an_engine_of_graphs_passes_every_check(
    monkeypatch: pytest.MonkeyPatch, model: str, arithmetic: str, suite: str
) -> None:
    """Its rings have other sizes than the bundle's, and its experts add in another order."""
    case = exported(**STEPS[model])
    session = step_session(case, arithmetic)
    monkeypatch.setattr("exporter.gate.run.load", lambda bundle, **options: session)
    report = validate(case.bundle, backend="onnxruntime-cuda", suite=suite)
    assert [(check.name, check.detail) for check in report.checks if check.passed is False] == []
    assert report.passed
    assert (report.engine, report.device) == (session.engine_name, session.device)


def test_an_engine_that_chooses_wrongly_among_its_logits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = exported(dtype="bfloat16")
    session = weightless(case.bundle, arithmetic="float32", plugins=ROLLING).session
    honest = Session.forward_candidates

    def wrong(self: Session, *arguments: Any) -> list[Candidates | None]:
        return [
            each if each is None or each.ids_N is None else Candidates(each.logits_N, each.ids_N + 1)
            for each in honest(self, *arguments)
        ]

    monkeypatch.setattr(Session, "forward_candidates", wrong)
    monkeypatch.setattr("exporter.gate.run.load", lambda bundle, **options: session)
    report = validate(case.bundle, backend="tensorrt")
    assert [check.name for check in report.checks if check.passed is False] == [
        "highest logits",
        "highest logits, batch",
        "greedy",
    ]
