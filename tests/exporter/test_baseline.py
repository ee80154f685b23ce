"""Regression memory: what is stored of a run, what counts as worse, and what is no baseline at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import exporter.baseline
from exporter.baseline import FLOOR, compare_baseline, machine_of, read_baseline, save_baseline
from exporter.cli import cli
from exporter.cli_baseline import SLOWER, WORSE
from exporter.validation_report import Check, Speed, ValidationReport, status_of
from runtime.errors import ExportError, InputError
from tests.support import reports
from tests.support.bundles import exported


def compared(stored: ValidationReport, now: ValidationReport, folder: Path, **factors: float) -> dict[str, Check]:
    file = folder / "baseline.json"
    save_baseline(file, stored)
    rows = compare_baseline(read_baseline(file), now, **({"worse": WORSE, "slower": SLOWER} | factors))
    return {row.name.removeprefix("baseline: "): row for row in rows}


def with_error(name: str, error: float) -> ValidationReport:
    good = reports.report()
    return replace(
        good, checks=tuple(replace(check, error=error) if check.name == name else check for check in good.checks)
    )


def test_the_same_run_is_not_worse(tmp_path: Path) -> None:
    rows = compared(reports.report(), reports.report(), tmp_path)
    assert {name: row.passed for name, row in rows.items()} == {"errors": True, "checks": True, "speed": True}
    assert all(row.error is None for row in rows.values()), "they are no measurements of logits"
    assert [path.name for path in tmp_path.iterdir()] == ["baseline.json"]


def test_what_is_stored(tmp_path: Path) -> None:
    save_baseline(tmp_path / "b.json", reports.report())
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["checks"]["uneven pieces"] == {"status": "passed", "error": 1.5e-6, "budget": 3e-6}
    assert document["checks"]["ragged batch"]["status"] == "not run"
    assert document["speed"] == {"prefill": 1234.5, "decode": 67.8}
    assert document["windows"] == [8]
    assert set(document["machine"]) == {"cpu", "cores", "memory_gib", "system", "device", "engine"}
    assert {"cierzo", "onnxruntime"} <= set(document["versions"])
    assert "folder/model" not in json.dumps(document), "no paths: the file belongs into the repository"


@pytest.mark.parametrize(
    ("error", "passed"),
    [
        (1e-6 * 0.1, True),
        (1e-6 + 0.99 * FLOOR * reports.BUDGET, True),  # 1.8 times, and still what roundings may do
        (1e-6 + 1.01 * FLOOR * reports.BUDGET, False),
        (3.9e-6, False),
        (float("inf"), False),
    ],
)
def test_an_error_that_grew(tmp_path: Path, error: float, passed: bool) -> None:
    rows = compared(reports.report(), with_error("prompt of 8", error), tmp_path)
    assert rows["errors"].passed is passed
    assert ("prompt of 8 1.0e-06 →" in rows["errors"].detail) is not passed
    assert rows["checks"].passed is rows["speed"].passed is True


def test_a_factor_of_the_users(tmp_path: Path) -> None:
    assert compared(reports.report(), with_error("prompt of 8", 3e-6), tmp_path)["errors"].passed is False
    rows = compared(reports.report(), with_error("prompt of 8", 3e-6), tmp_path, worse=3.5)
    assert rows["errors"].passed
    assert "at most 3 times as large" in rows["errors"].detail


@pytest.mark.parametrize(
    ("error", "passed"), [(0.0, True), (0.99 * FLOOR * reports.BUDGET, True), (1.01 * FLOOR * reports.BUDGET, False)]
)
def test_an_error_that_was_nothing(tmp_path: Path, error: float, passed: bool) -> None:
    rows = compared(with_error("prompt of 8", 0.0), with_error("prompt of 8", error), tmp_path)
    assert rows["errors"].passed is passed
    rows = compared(with_error("prompt of 8", error), with_error("prompt of 8", 0.0), tmp_path)
    assert rows["errors"].passed, "it became better"


def test_exactly_the_factor_is_let_pass(tmp_path: Path) -> None:
    assert compared(with_error("reset", 2e-6), with_error("reset", 3e-6), tmp_path)["errors"].passed
    speed = Speed(1000.0, 130.0)
    now = reports.report(speed=Speed(1000.0, 100.0))
    assert compared(reports.report(speed=speed), now, tmp_path)["speed"].passed


def test_another_type_is_named(tmp_path: Path) -> None:
    now = replace(with_error("prompt of 8", 1e-3), dtype="float16")
    assert "it rounds to float16 and did to float32" in compared(reports.report(), now, tmp_path)["errors"].detail


def test_a_check_that_no_longer_runs(tmp_path: Path) -> None:
    good = reports.report()
    checks = [check for check in good.checks if check.name != "reset"]
    checks[1] = Check("uneven pieces", None, "no memory")
    row = compared(good, replace(good, checks=tuple(checks)), tmp_path)["checks"]
    assert not row.passed
    assert "uneven pieces (not run), reset (gone)" in row.detail
    # What did not run before either is not missed, and what is new is welcome.
    more = (*good.checks[:3], Check("new", True, ""))
    assert compared(good, replace(good, checks=more), tmp_path)["checks"].passed


@pytest.mark.parametrize(
    ("speed", "passed"),
    [
        (Speed(1234.5 / 1.29, 67.8), True),
        (Speed(1234.5 / 1.31, 67.8), False),
        (Speed(9999.0, 67.8 / 2), False),
        (Speed(None, 67.0), True),
        (Speed(None, None), None),
    ],
)
def test_speed(tmp_path: Path, speed: Speed, passed: bool | None) -> None:
    row = compared(reports.report(), replace(reports.report(), speed=speed), tmp_path)["speed"]
    assert row.passed is passed
    slow = compared(reports.report(), replace(reports.report(), speed=speed), tmp_path, slower=2.5)["speed"]
    assert slow.passed is (None if passed is None else True)


@pytest.mark.parametrize("part", ["cpu", "cores", "device", "engine"])
def test_speed_of_another_machine_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    other = machine_of(reports.report()) | {part: "another"}
    with monkeypatch.context() as patch:
        patch.setattr(exporter.baseline, "machine_of", lambda _: other)
        save_baseline(tmp_path / "b.json", reports.report())
    slow = reports.report(speed=Speed(1.0, 1.0))
    row = compare_baseline(read_baseline(tmp_path / "b.json"), slow, worse=WORSE, slower=SLOWER)[2]
    assert row.passed is None
    assert f"another machine ({part}): speed is not compared" in row.detail


@pytest.mark.parametrize(
    "change", [{"suite": "full"}, {"seed": 4}, {"backend": "tensorrt"}, {"windows": (9,)}, {"chunk": 5}]
)
def test_another_run_cannot_be_compared(tmp_path: Path, change: dict[str, Any]) -> None:
    save_baseline(tmp_path / "b.json", reports.report())
    with pytest.raises(InputError, match=f"of another run: {next(iter(change))}"):
        compare_baseline(read_baseline(tmp_path / "b.json"), reports.report(**change), worse=WORSE, slower=SLOWER)


def test_a_run_that_fails_is_nothing_to_go_by(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not pass"):
        save_baseline(tmp_path / "b.json", reports.failing())
    assert not list(tmp_path.iterdir())


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another version": lambda d: d.update(cierzo_baseline=2),
    "another file": dict.clear,
    "no checks": lambda d: d.pop("checks"),
    "checks that are none": lambda d: d.update(checks=[1]),
    "a failed check": lambda d: d["checks"]["reset"].update(status="failed"),
    "an error as text": lambda d: d["checks"]["prompt of 8"].update(error="1"),
    "a negative error": lambda d: d["checks"]["prompt of 8"].update(error=-1),
    "no speed": lambda d: d.pop("speed"),
    "a check without a budget": lambda d: d["checks"]["prompt of 8"].pop("budget"),
    "a check that is null": lambda d: d["checks"].update(reset=None),
    "a speed that is true": lambda d: d["speed"].update(decode=True),
    "no machine": lambda d: d.pop("machine"),
    "no seed": lambda d: d.pop("seed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_baseline_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "b.json"
    save_baseline(file, reports.report())
    document = json.loads(file.read_text())
    DAMAGE[name](document)
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"is not a baseline .* --save-baseline FILE"):
        read_baseline(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}'])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.json").write_bytes(content)
    with pytest.raises(InputError, match="not readable JSON"):
        read_baseline(tmp_path / "b.json")


def test_files_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_baseline(tmp_path / "missing.json")
    with pytest.raises(ExportError, match=r"The baseline .* cannot be written"):
        save_baseline(tmp_path / "missing" / "b.json", reports.report())


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        cli, ["validate", *(str(argument) for argument in arguments), "--suite", "quick", "--no-receipt"]
    )


def test_the_command(tmp_path: Path) -> None:
    case, file = exported(num_layers=1, seed=5), tmp_path / "baseline.json"
    stored = run(case.bundle, "--save-baseline", file)
    assert stored.exit_code == 0, stored.output
    assert "as a baseline" in stored.stderr
    again = run(case.bundle, "--baseline", file, "--slower", "1000", "--json")
    assert again.exit_code == 0, again.output
    rows = {check["name"]: check["status"] for check in json.loads(again.stdout)["checks"][-3:]}
    assert rows == {"baseline: errors": "passed", "baseline: checks": "passed", "baseline: speed": "passed"}

    document = json.loads(file.read_text())
    document["checks"]["a check that was"] = {"status": "passed", "error": None, "budget": None}
    file.write_text(json.dumps(document))
    page, junit = tmp_path / "page.html", tmp_path / "junit.xml"
    worse = run(case.bundle, "--baseline", file, "--report", page, "--junit", junit)
    assert worse.exit_code == 1
    assert "Parity fails: baseline: checks" in worse.stdout
    for text in (page.read_text(encoding="utf-8"), junit.read_text(encoding="utf-8")):
        assert "a check that was (gone)" in text

    file.write_text("{}")
    broken = run(case.bundle, "--baseline", file)
    assert (broken.exit_code, broken.stdout) == (2, "")
    assert "is not a baseline" in broken.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--baseline", "a.json", "--save-baseline", "b.json"), "exclude each other"),
        (("--worse", "2"), "are for --baseline"),
        (("--slower", "2"), "are for --baseline"),
        (("--baseline", "a.json", "--worse", "0.5"), "0.5 is not in the range"),
        (("--baseline", "a.json", "--worse", "nan"), "'nan' is not a number"),
        (("--baseline", "a.json", "--slower", "inf"), "'inf' is not a number"),
        (("--max-kl", "nan"), "'nan' is not a number"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run(tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_failing_run_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "b.json"
    monkeypatch.setattr("exporter.validate.validate", lambda *_, **__: reports.failing())
    result = run(tmp_path, "--save-baseline", file)
    assert result.exit_code == 1
    assert "is not stored as a baseline." in result.stderr
    assert not file.exists()
    file.write_text("older")
    assert "and the file keeps the run that it has" in run(tmp_path, "--save-baseline", file).stderr
    assert file.read_text() == "older"


def test_a_run_whose_modules_fail_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.validate.validate", lambda *_, **__: reports.report())
    monkeypatch.setattr("exporter.layer_parity.compare_layers", lambda *_, **__: reports.layers(passed=False))
    result = run(tmp_path, "--layers", "--save-baseline", tmp_path / "b.json")
    assert result.exit_code == 1
    assert "is not stored as a baseline" in result.stderr
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--baseline", "b.json", "--seed", "4"),
        ("--baseline", "b.json", "--backend", "abacus"),
        ("--save-baseline", "missing/b.json"),
        ("--report", "missing/page.html"),
        ("--junit", "missing/junit.xml"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_baseline(tmp_path / "b.json", reports.report())
    monkeypatch.setattr("exporter.validate.validate", lambda *_, **__: pytest.fail("the checks were run"))
    result = run(tmp_path, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("cierzo: The ")


def test_a_failing_run_takes_receipts_away_whatever_its_baseline_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and chunk are known only when the run is over, and then nothing can be compared."""
    concluded: list[bool] = []
    file = tmp_path / "b.json"
    save_baseline(file, reports.report(windows=(9,)))
    monkeypatch.setattr(
        "exporter.cli_receipt.Receipts.conclude", lambda _, __, *, holds, **___: concluded.append(holds)
    )
    monkeypatch.setattr("exporter.validate.validate", lambda *_, **__: reports.failing())
    result = run(tmp_path, "--baseline", file, "--seed", "3")
    assert result.exit_code == 2
    assert "The baseline is of another run: windows" in result.stderr
    assert concluded == [False]
    monkeypatch.setattr("exporter.validate.validate", lambda *_, **__: reports.report())
    assert run(tmp_path, "--baseline", file, "--seed", "3").exit_code == 2
    assert concluded == [False], "it is not known whether this one would pass"


def test_statuses_are_those_of_reports() -> None:
    assert {status_of(check) for check in reports.failing().checks} == {"passed", "failed", "not run"}
