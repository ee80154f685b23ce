"""The report of a validation as one HTML file that needs nothing else: verdict, plots, tables."""

from __future__ import annotations

import os
import tempfile
from html import escape
from pathlib import Path

from exporter.layer_report import LayerReport, ModuleParity, percent
from exporter.save import absolute
from exporter.svg_plot import Mark, error_plot
from exporter.validation_report import ValidationReport, status_of
from runtime.errors import ExportError

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #5b6570; --line: #d5dae0;
        --good: #17753a; --bad: #c22929; --budget: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e9ec; --soft: #a0a9b3; --line: #363d45;
          --good: #58c27d; --bad: #ff7b72; --budget: #e0a93b; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 960px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.plot { width: 100%; height: auto; } .plot text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.plot .tick { fill: var(--soft); } .plot .grid { stroke: var(--line); } .plot .axis { stroke: var(--soft); }
.plot .allowed { fill: none; stroke: var(--budget); stroke-width: 1.5; stroke-dasharray: 6 4; }
.plot .budget { fill: var(--budget); }
.plot .within { fill: var(--good); } .plot .off { fill: var(--bad); } .plot circle:hover { stroke: var(--ink); }
"""

_MOST_MARKS = 1500
"""Marks in the plot by position: of a longer row, each stretch is shown by its worst position."""


def write_html(path: Path, report: ValidationReport, layers: LayerReport | None) -> None:
    """Write the report to `path`, whole or not at all. Raises ExportError when the file cannot be written."""
    target = absolute(path)
    partial: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        partial = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html(report, layers))
        partial.chmod(0o644)  # mkstemp makes it private
        partial.replace(target)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise ExportError(f"The report {target} cannot be written: {error.strerror or error}.") from error


def html(report: ValidationReport, layers: LayerReport | None) -> str:
    """The whole page."""
    passed = report.passed and (layers is None or layers.passed)
    verdict = '<span class="good">Parity holds</span>' if passed else '<span class="bad">Parity fails</span>'
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in report.versions.items())
    body = [
        f"<h1>{verdict}</h1>",
        f"<p>Bundle <b>{escape(report.bundle)}</b> on {escape(report.backend)}, held against <b>"
        f"{escape(report.checkpoint)}</b>, seed {report.seed}.<br><span class='soft'>{versions}</span></p>",
        *(_layers(layers) if layers is not None else []),
        *_checks(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{'Parity holds' if passed else 'Parity fails'}: {escape(Path(report.bundle).name)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _layers(report: LayerReport) -> list[str]:
    """Error by depth: plot and table."""
    last = max((module.depth for module in report.modules), default=0) + 1
    by_depth: dict[int, list[ModuleParity]] = {}
    for module in report.modules:
        by_depth.setdefault(module.depth if module.depth >= 0 else last, []).append(module)
    marks = [
        Mark(depth + index / len(modules), module.error, module.budget, _tooltip(module), module.passed)
        for depth, modules in by_depth.items()
        for index, module in enumerate(modules)
    ]
    ticks = [
        (float(depth), "embedding" if depth == 0 else "head" if depth == last else f"layer {depth - 1}")
        for depth in by_depth
    ]
    plot = error_plot(
        marks,
        ticks,
        x_label="depth: every module in the order of computation",
        y_label="largest |error|",
        title="Largest error of each module's output, and its budget",
    )
    rows = [
        f"<tr><td>{escape(module.module)}</td><td class='number'>{module.error:.2e}</td>"
        f"<td class='number'>{module.budget:.2e}</td><td class='number'>{percent(module.share)}</td>"
        f"<td class='{'good' if module.passed else 'bad'}'>{'within' if module.passed else 'off'}</td></tr>"
        for module in report.modules
    ]
    first = report.first_failure
    found = "Every module is within its budget." if first is None else f"The first module off is {first.module}."
    return [
        "<h2>Error by depth</h2>",
        f"<p>{escape(found)} {escape(report.what_was_done)} Dashed: the budget, which is what the reference itself "
        f"errs in {escape(report.dtype)} times the table's multiple.</p>",
        plot,
        "<h2>Modules</h2>",
        "<table><thead><tr><th>module</th><th class='number'>largest error</th><th class='number'>budget</th>"
        "<th class='number'>of budget</th><th>verdict</th></tr></thead><tbody>",
        *rows,
        "</tbody></table>",
    ]


def _tooltip(module: ModuleParity) -> str:
    return f"{module.module}: {module.error:.2e}, {percent(module.share)} of its budget {module.budget:.2e}"


def _checks(report: ValidationReport) -> list[str]:
    """Error by position: plot and table of the ordinary checks."""
    errors = report.position_errors
    width = -(-len(errors) // _MOST_MARKS) or 1
    worst = [
        max(range(at, min(at + width, len(errors))), key=errors.__getitem__) for at in range(0, len(errors), width)
    ]
    marks = [
        Mark(
            position,
            errors[position],
            report.budget,
            f"position {position}: {errors[position]:.2e}",
            errors[position] <= report.budget,
        )
        for position in worst
    ]
    plot = error_plot(
        marks,
        [(float(position), f"{position:,}") for position in range(0, len(errors), max(1, len(errors) // 10))],
        x_label="position in the row",
        y_label="largest |error| of a logit",
        title="Largest error of the logits at each position, and the budget",
    )
    rows = []
    for check in report.checks:
        status = status_of(check)
        error = "" if check.error is None else f"{check.error:.2e}"
        colour = {"passed": "good", "failed": "bad"}.get(status, "soft")
        rows.append(
            f"<tr><td>{escape(check.name)}</td><td class='{colour}'>{status}</td><td class='number'>{error}</td>"
            f"<td>{escape(check.detail)}</td></tr>"
        )
    return [
        "<h2>Error by position</h2>",
        f"<p>Budget {report.budget:.2e}: the reference itself is off by {report.reference_error:.2e} in "
        f"{escape(report.dtype)} against float64, on logits up to {report.largest_logit:.3g}.</p>",
        plot if marks else "",
        "<h2>Checks</h2>",
        "<table><thead><tr><th>check</th><th>verdict</th><th class='number'>largest error</th>"
        "<th>what was done</th></tr></thead><tbody>",
        *rows,
        "</tbody></table>",
    ]
