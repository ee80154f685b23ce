"""The report's sections in words and tables: verdict, facts, budget, checks, quality."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from exporter.layer_report import LayerReport
from exporter.report_html.tables import duration, figure, percent, share_bar, share_of, table, verdict
from exporter.validation_report import Quality, ValidationReport, status_of
from reference.parity import TOLERANCES

_NAMED = 4
"""Failures that the heading names."""


def heading(report: ValidationReport, layers: LayerReport | None) -> list[str]:
    """Verdict, what failed, and the facts of the run."""
    passed = report.passed and (layers is None or layers.passed)
    failed = [check.name for check in report.checks if check.passed is False]
    if layers is not None and not layers.passed:
        failed.append("modules")
    counts = {status: sum(status_of(check) == status for check in report.checks) for status in ("passed", "not run")}
    ran = f"{counts['passed']} checks hold"
    if counts["not run"]:
        ran += f", {counts['not run']} could not be run"
    if failed:
        named = ", ".join(failed[:_NAMED]) + (f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else "")
        ran = f"{named} {'fails' if len(failed) == 1 and failed != ['modules'] else 'fail'}; {ran}"
    elif not passed:
        ran = f"nothing was compared; {ran}"
    return [
        f"<header class='{'passed' if passed else 'failed'}'>",
        f"<h1><span class='{'good' if passed else 'bad'}'><span aria-hidden='true'>{'✓' if passed else '✕'}</span> "
        f"Parity {'holds' if passed else 'fails'}</span></h1>",
        f"<p><b>{escape(Path(os.path.abspath(report.bundle)).name)}</b>: {escape(ran)}. {escape(_nearest(report))}</p>",
        "</header>",
        _facts(report),
    ]


def _nearest(report: ValidationReport) -> str:
    """The check that takes most of its own budget, in a sentence: not all checks have the same one."""
    measured = [
        (share_of(check.error, budget), check.error, check.name)
        for check in report.checks
        if check.error is not None and (budget := report.budget_of(check)) is not None
    ]
    if not measured:
        return ""
    share, error, name = max(measured, key=lambda found: found[:2])
    which = "Nearest to its budget" if share <= 1 else "Farthest beyond its budget"
    if error == float("inf"):
        return f"{which}: {name}, with an error that is not finite."
    much = percent(share) if percent(share).endswith("×") else f"{percent(share)} of"
    return f"{which}: {name}, with an error of {figure(error)}, {much} what is allowed there."


_WIDE = ("Bundle", "Held against", "Versions")
"""Facts that may be long."""


def _facts(report: ValidationReport) -> str:
    speed = [
        f"{name} {rate:,.0f}"
        for name, rate in (("prefill", report.speed.prefill), ("decode", report.speed.decode))
        if rate is not None
    ]
    windows = [f"{window:,}" if window is not None else "full" for window in dict.fromkeys(report.windows)]
    facts = {
        "Bundle": report.bundle,
        "Held against": report.checkpoint,
        "Suite": f"{report.suite}, seed {report.seed}",
        "Backend": report.backend + (f", engine {report.engine}" if report.engine else ""),
        "Device": report.device,
        "Rounds to": report.dtype,
        "Windows": ", ".join(windows) + f"; chunk {report.chunk:,}" if windows else "",
        "Took": duration(report.seconds) if report.seconds else "",
        "Most memory": f"{report.peak_bytes / 2**30:.2f} GiB" if report.peak_bytes else "",
        "Tokens a second, in passing": ", ".join(speed),
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    items = "".join(
        f"<div{' class=wide' if name in _WIDE else ''}><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
        for name, text in facts.items()
        if text
    )
    return f"<dl>{items}</dl>"


def budget_words(report: ValidationReport) -> str:
    """Where the budget comes from, as plain text."""
    tolerance = TOLERANCES.get(report.dtype)
    text = (
        f"The truth is the reference model in float64. On the same tokens the reference itself is off by "
        f"{report.reference_error:.2e} when it rounds as the engine does ({report.dtype}), on logits up to "
        f"{report.largest_logit:.3g}. The engine may be off by {report.budget:.2e}"
    )
    if tolerance is None:
        return f"{text}."
    own, floor = tolerance.multiple * report.reference_error, tolerance.floor * tolerance.eps * report.largest_logit
    if report.budget < 0.999 * max(own, floor):
        why = f"{tolerance.ceiling:g} of the largest logit, the most that is ever allowed"
    elif own >= floor:
        why = f"{tolerance.multiple:g} times the reference's own error"
    else:
        why = (
            f"{tolerance.floor:g} roundings (ε = {tolerance.eps:.1e}) of the largest logit, below which both errors "
            "are a handful of roundings and their ratio says nothing"
        )
    return f"{text}: {why}.{_beyond(report)}"


def _beyond(report: ValidationReport) -> str:
    """Where something else was allowed, and why."""
    behind = max(report.position_budgets, default=0.0)
    elsewhere = max((check.budget for check in report.checks if check.budget is not None), default=0.0)
    found = ""
    if behind > 1.001 * report.budget:
        found += (
            " At a token of which a rounded router may choose another expert, and behind it, the budget is what that "
            f"choice costs, which was measured: up to {behind:.2e}."
        )
    if elsewhere > 1.001 * max(report.budget, behind):
        found += (
            f" Checks that feed other tokens have budgets of their own, made in the same way: up to {elsewhere:.2e}."
        )
    return found + (" Shares on this page are of the budget that holds there." if found else "")


def _multiple(report: ValidationReport) -> str:
    """Why the budget is that multiple, folded away."""
    tolerance = TOLERANCES.get(report.dtype)
    asked = "Why so much?" if tolerance is None else f"Why {tolerance.multiple:g} times the reference's own error?"
    reason = report.reason[:1].upper() + report.reason[1:]
    return f"<details><summary>{escape(asked)}</summary><p>{escape(reason)}.</p></details>"


def checks(report: ValidationReport) -> list[str]:
    """The budget in words, every check with its share of it, and what was not run."""
    columns = (
        ("check", "name"), ("verdict", "verdict"), ("error", "number"), ("of budget", "share"),
        ("time", "number"), ("what was done", "done"),
    )  # fmt: skip
    rows = [
        (
            check.name,
            verdict(status_of(check)),
            "" if check.error is None else figure(check.error),
            share_bar(check.error, report.budget_of(check)),
            duration(check.seconds) if check.seconds else "",
            check.detail,
        )
        for check in sorted(report.checks, key=lambda check: check.passed is not False)
        if check.passed is not None
    ]
    body = [
        "<h2>Checks</h2>",
        f"<p>{escape(budget_words(report))}</p>",
        _multiple(report),
        table("Every check that ran, failures first", columns, rows),
    ]
    missing = [check for check in report.checks if check.passed is None]
    if missing or report.unverified:
        items = [f"<li><b>{escape(check.name)}</b>: {escape(check.detail)}</li>" for check in missing]
        items += [
            f"<li>The hash of <b>{escape(name)}</b>: the manifest has none, only its size was compared</li>"
            for name in report.unverified
        ]
        body += ["<h2>Not run</h2>", "<p>These count for nothing.</p>", f"<ul>{''.join(items)}</ul>"]
    return body


def quality(found: Quality | None) -> list[str]:
    """What quantising the weights cost."""
    if found is None:
        return []
    ratio = "" if found.perplexity_ratio is None else f", perplexity × {found.perplexity_ratio:.3f}"
    return [
        "<h2>Quality of the quantised weights</h2>",
        f"<p>Against the original checkpoint on {found.tokens:,} tokens of this text: {escape(found.source)}. "
        f"KL divergence {found.kl:.2g} nats on average, the same best token at {found.agreement:.1%} of the positions"
        f"{ratio}. All else on this page holds the engine against its own quantised weights, as numbers.</p>",
    ]
