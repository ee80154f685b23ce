"""What a run of `cierzo validate` is held against besides the reference: an earlier run of the same checks.

The budget says whether an engine is right. A baseline says whether it got worse while it still is: an error that a new
version doubles, a check that no longer runs, a speed that is gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from exporter.validation_report import Check, Speed, ValidationReport, status_of
from exporter.whole_file import BASELINE, write_whole
from runtime.errors import InputError
from runtime.json_files import read_json_object

BASELINE_VERSION = 1
"""Of the file; another one is refused."""

FLOOR = 0.2
"""Share of the stored budget by which an error must have grown to count; below it a ratio compares roundings.

The same engine repeats its errors to the bit. Engines that compute the same function otherwise do not: when every
native kernel was exchanged for the portable bodies, in 18 runs of six bundles (float32 and int4, dense and mixtures),
single checks moved by up to 0.145 of the budget and 3.4 times, while no error reached a third of the budget.
"""

_SAME = ("suite", "seed", "backend", "windows", "chunk")
"""What two runs must share: with another of these they feed other tokens, or name other checks."""


@dataclass(frozen=True, slots=True)
class StoredCheck:
    """A check of the stored run: its verdict in words, its error and what was allowed there."""

    status: str
    error: float | None
    budget: float | None


@dataclass(frozen=True, slots=True)
class Baseline:
    """A stored run. same: what a run that is compared must share; machine: what it must share for speed to count."""

    same: Mapping[str, Any]
    dtype: str
    checks: Mapping[str, StoredCheck]
    speed: Speed
    machine: Mapping[str, Any]
    versions: Mapping[str, str]


def save_baseline(path: Path, report: ValidationReport) -> None:
    """Store what matters of a run that passed.

    Raises ExportError when the file cannot be written, InputError for a run that failed: it is nothing to go by.
    """
    if not report.passed:
        raise InputError("This run does not pass, so it was not stored as a baseline.")
    document = {
        "cierzo_baseline": BASELINE_VERSION,
        **_same(report),
        "dtype": report.dtype,
        "budget": report.budget,
        "reference_error": report.reference_error,
        "largest_error": report.largest_error,
        "checks": {
            check.name: {"status": status_of(check), "error": check.error, "budget": report.budget_of(check)}
            for check in report.checks
        },
        "speed": asdict(report.speed),
        "machine": machine_of(report),
        "versions": {**report.versions, "cierzo": _own_version()},
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n", BASELINE)


def machine_of(report: ValidationReport) -> dict[str, Any]:
    """What speed depends on: two runs are compared in it only where all of this is the same."""
    from exporter.machine import describe

    found = describe()
    kept = {name: found[name] for name in ("cpu", "cores", "memory_gib", "system")}
    return {**kept, "device": report.device, "engine": report.engine}


def _own_version() -> str:
    try:
        return version("cierzo")
    except PackageNotFoundError:
        return "source tree"


def _same(report: ValidationReport) -> dict[str, Any]:
    values = {name: getattr(report, name) for name in _SAME}
    return values | {"windows": list(dict.fromkeys(report.windows))}


def read_baseline(path: Path) -> Baseline:
    """Read a stored run. Raises InputError for a file that is missing, damaged or not a baseline of this version."""
    way_out = "Store one with `cierzo validate BUNDLE --save-baseline FILE`."

    def damaged(cause: str) -> InputError:
        return InputError(f"{path} is not a baseline that this version can read ({cause}). {way_out}")

    document = read_json_object(path, InputError, way_out=way_out)
    if document.get("cierzo_baseline") != BASELINE_VERSION:
        raise damaged(f'its "cierzo_baseline" is {document.get("cierzo_baseline")!r} and not {BASELINE_VERSION}')
    try:
        checks = {name: _stored(entry) for name, entry in document["checks"].items()}
        speed = Speed(*(_number(document["speed"][name]) for name in ("prefill", "decode")))
        same = {name: document[name] for name in _SAME}
        machine, versions = dict(document["machine"]), dict(document["versions"])
        dtype = str(document["dtype"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(f"{type(error).__name__}: {error}") from error
    return Baseline(same, dtype, checks, speed, machine, versions)


def _stored(entry: Mapping[str, Any]) -> StoredCheck:
    if entry["status"] not in ("passed", "not run"):
        raise ValueError(f"a check's status is {entry['status']!r}")
    return StoredCheck(entry["status"], _number(entry["error"]), _number(entry["budget"]))


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{value!r} is not a figure")
    return float(value)


def compare_baseline(baseline: Baseline, report: ValidationReport, *, worse: float, slower: float) -> tuple[Check, ...]:
    """Rows for the report's checks: errors, checks that are gone, and speed, each against the stored run.

    worse: how many times the stored error a new one may be; slower: how many times the new speed the stored one.
    Raises InputError where the two runs did not do the same, so that nothing can be compared.
    """
    require_same(baseline, _same(report))
    return (_errors(baseline, report, worse), _gone(baseline, report), _speed(baseline, report, slower))


def require_same(baseline: Baseline, ours: Mapping[str, Any]) -> None:
    """Raises InputError where the stored run has another suite, seed, backend, windows or chunk than `ours` names."""
    stored = baseline.same
    other = [f"{name} {stored[name]} (here {here})" for name, here in ours.items() if stored[name] != here]
    if other:
        raise InputError(
            f"The baseline is of another run: {', '.join(other)}. Run with the same options on the same model, or "
            "store a new baseline with --save-baseline."
        )


def _errors(baseline: Baseline, report: ValidationReport, worse: float) -> Check:
    grown: list[tuple[float, str]] = []
    compared, largest = 0, 0.0
    for check in report.checks:
        stored = baseline.checks.get(check.name)
        if stored is None or stored.error is None or stored.budget is None or check.error is None:
            continue
        compared += 1
        ratio = check.error / stored.error if stored.error > 0 else float("inf") if check.error > 0 else 1.0
        if check.error - stored.error <= FLOOR * stored.budget:
            continue
        largest = max(largest, ratio)
        if ratio > worse:
            grown.append((ratio, f"{check.name} {stored.error:.1e} → {check.error:.1e}"))
    if not grown:
        words = f"at most {largest:.2g} times as large" if largest > 1 else "none grew beyond rounding"
        return Check("baseline: errors", True, f"{compared} errors: {words}, up to {worse:g} times are let pass")
    grown.sort(key=lambda item: -item[0])
    kind = "" if baseline.dtype == report.dtype else f"; it rounds to {report.dtype} and did to {baseline.dtype}"
    named = ", ".join(text for _, text in grown[:3]) + (f" and {len(grown) - 3} more" if len(grown) > 3 else "")
    return Check("baseline: errors", False, f"more than {worse:g} times as large: {named}{kind}")


def _gone(baseline: Baseline, report: ValidationReport) -> Check:
    ran = {check.name for check in report.checks if check.passed is not None}
    named = {check.name for check in report.checks}
    gone = [
        f"{name} ({'not run' if name in named else 'gone'})"
        for name, stored in baseline.checks.items()
        if stored.status != "not run" and name not in ran
    ]
    if gone:
        return Check("baseline: checks", False, f"ran in the stored run and not in this one: {', '.join(gone)}")
    due = sum(stored.status != "not run" for stored in baseline.checks.values())
    return Check("baseline: checks", True, f"all {due} checks of the stored run ran again")


def _speed(baseline: Baseline, report: ValidationReport, slower: float) -> Check:
    name, here = "baseline: speed", machine_of(report)
    differ = [key for key in here if baseline.machine.get(key) != here[key]]
    if differ:
        return Check(name, None, f"the stored run is of another machine ({', '.join(differ)}): speed is not compared")
    pairs = list(_speeds(baseline.speed, report.speed))
    if not pairs:
        return Check(name, None, "no speed was measured in both runs")
    words = ", ".join(f"{kind} {before:,.0f} → {now:,.0f} tokens/s" for kind, before, now in pairs)
    slow = any(now * slower < before for _, before, now in pairs)
    return Check(name, not slow, f"{words}; down to 1/{slower:g} is let pass")


def _speeds(before: Speed, now: Speed) -> Iterator[tuple[str, float, float]]:
    for kind in ("prefill", "decode"):
        a, b = getattr(before, kind), getattr(now, kind)
        if a is not None and b is not None:
            yield kind, a, b
