"""The report: Markdown for people, and JSON with every finding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.gpu.findings import Check, Fact, Finding, Skip, Timing

NAME = "gpu"
ALONE = {"onnxruntime": "onnxruntime_cuda"}
"""Reports of sections that are mostly run alone, and are not to replace the one of the others."""
TITLES = {NAME: "Kernels, plugins and engines on a GPU", "onnxruntime_cuda": "ONNX Runtime engines on a GPU"}
HELD, FAILED, NO_GPU, PARTLY = 0, 1, 2, 3
"""Exit codes: all that was asked for held; something did not; there is no GPU; nothing failed, but not all was done."""

METHODS = {
    NAME: (
        "Errors are shares of the budget in `tests/support/kernel_budgets.py`, against the definition in float64 on "
        "the same stored inputs. Times are medians of CUDA graphs between CUDA events, warmed up, on random inputs "
        "that are larger than the L2 cache or rotated. Bandwidths count each byte that must be read or written once."
    ),
    "onnxruntime_cuda": (
        "Errors are shares of the budget in `reference/parity.py`, against the reference in float64 and transformers "
        "in float32. A token's time is the median as the session's caller sees it, on the host; so is a prompt's. The "
        "bytes of a token are its weights, once each, and the keys and values that it sees. Weights are random numbers "
        "made on the machine. transformers runs the same weights in the same run; of its rounds the fastest counts."
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """All of one run. machine: what it ran on. asked: the sections, in words. seconds: that it took.

    name: of the report's files.
    """

    machine: Mapping[str, Any]
    asked: str
    seed: int
    seconds: float
    findings: Sequence[Finding]
    name: str = NAME

    def of(self, kind: type[Any]) -> list[Any]:
        return [finding for finding in self.findings if isinstance(finding, kind)]


def report_name(sections: Sequence[str]) -> str:
    """Of the files of a report on these sections."""
    return ALONE.get(sections[0], NAME) if len(sections) == 1 else NAME


def exit_code(findings: Iterable[Finding]) -> int:
    """HELD, FAILED or PARTLY. A target that was missed is no failure; nothing found at all is."""
    found = list(findings)
    checks = [finding for finding in found if isinstance(finding, Check)]
    if not all(check.held for check in checks) or not found:
        return FAILED
    return PARTLY if any(isinstance(finding, Skip) and not finding.expected for finding in found) else HELD


def verdict(run: Run) -> str:
    """A sentence for the end of the run and the head of the report."""
    checks, skips, timings = run.of(Check), run.of(Skip), run.of(Timing)
    failed = [check for check in checks if not check.held]
    targets = [timing for timing in timings if timing.reached is not None]
    missed = [timing for timing in targets if not timing.reached]
    unexpected = [skip for skip in skips if not skip.expected]
    said = f"{len(checks) - len(failed)} of {len(checks)} checks hold"
    if targets:
        said += f", {len(targets) - len(missed)} of {len(targets)} targets for speed are reached"
    if unexpected:
        said += f", {len(unexpected)} things could not be done"
    return said + "."


def write_report(run: Run, folder: Path) -> Path:
    """Write both files into the folder; returns the path of the one in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": dict(run.machine),
        "asked": run.asked,
        "seed": run.seed,
        "seconds": round(run.seconds, 1),
        "verdict": verdict(run),
        **{
            kind.__name__.lower() + "s": [_plain(finding) for finding in run.of(kind)] for kind in (Check, Timing, Skip)
        },
        "facts": {fact.name: fact.value for fact in run.of(Fact)},
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, default=str)
    (folder / f"{run.name}.json").write_text(text + "\n", encoding="utf-8")
    path = folder / f"{run.name}.md"
    path.write_text(markdown(run) + "\n", encoding="utf-8")
    return path


def _plain(finding: Finding) -> dict[str, Any]:
    more = {"reached": finding.reached} if isinstance(finding, Timing) else {}
    return {**asdict(finding), **more}


def markdown(run: Run) -> str:
    """The report as Markdown."""
    machine = "; ".join(f"{name} {value}" for name, value in run.machine.items())
    lines = [
        f"# {TITLES[run.name]}",
        "",
        f"{machine}.",
        "",
        f"Asked for: {run.asked}. Seed {run.seed}. {run.seconds:.0f} s. **{verdict(run)}**",
        "",
        METHODS[run.name],
    ]
    if facts := run.of(Fact):
        lines += ["", "## Measured first, and what was found", "", *_table([_fact(fact) for fact in facts])]
    if timings := run.of(Timing):
        lines += ["", "## Speed", "", *_table([_timing(timing) for timing in timings])]
    checks: list[Check] = run.of(Check)
    if failed := [check for check in checks if not check.held]:
        lines += ["", "## What does not hold", ""]
        lines += [f"- **{check.section}, {check.name}**: {_one_line(check.said) or _over(check)}" for check in failed]
    if checks:
        lines += ["", "## Checks", ""]
        for section in dict.fromkeys(check.section for check in checks):
            own = [check for check in checks if check.section == section]
            held = sum(check.held for check in own)
            worst = max((check.worst for check in own if check.worst is not None), default=None)
            most = "" if worst is None else f"; the largest error is {worst:.2f} of its budget"
            lines += ["", f"### {section}: {held} of {len(own)} hold{most}", ""]
            lines += _table([_check(check) for check in own])
    if skips := run.of(Skip):
        lines += ["", "## What was not done", ""]
        lines += [f"- {skip.section}, {skip.name}: {_one_line(skip.reason)}" for skip in skips]
    return "\n".join(lines)


def _over(check: Check) -> str:
    return "" if check.worst is None else f"{check.worst:.3g} times what is allowed"


def _fact(fact: Fact) -> dict[str, str]:
    value = f"{fact.value:.4g}" if isinstance(fact.value, float) else _one_line(str(fact.value))
    return {"what": fact.name, "value": value}


def _check(check: Check) -> dict[str, str]:
    worst = "" if check.worst is None else f"{check.worst:.2f}"
    return {"check": check.name, "holds": "yes" if check.held else "**no**", "of the budget": worst}


def _timing(timing: Timing) -> dict[str, str]:
    reached = {None: "", True: "yes", False: "**no**"}[timing.reached]
    return {
        "what": f"{timing.section}: {timing.name}",
        "µs": f"{timing.microseconds:.1f}",
        "speed": f"{timing.figure:.4g} {timing.unit}",
        "share": "" if timing.share is None else f"{timing.share:.2f} of {timing.against}",
        "target": "" if timing.target is None else f"≥ {timing.target}",
        "reached": reached,
    }


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def _one_line(text: str) -> str:
    return " ".join(text.split())
