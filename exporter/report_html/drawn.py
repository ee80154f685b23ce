"""The report's sections with plots, each with its table: errors by position and by depth, tokens, divergence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from exporter.layer_report import LayerReport, ModuleParity
from exporter.report_html.canvas import round_steps
from exporter.report_html.plots import (
    Mark,
    agreement_plot,
    agreement_states,
    bin_name,
    divergence_plot,
    error_plot,
    log_bins,
    subscript,
    window_borders,
)
from exporter.report_html.tables import figure, percent, share_bar, share_of, table, verdict
from exporter.validation_report import ValidationReport

NEAR_TIE = 2.0
"""Budgets: two logits that are each off by one may change places when the truth's margin is below two of them."""

_STRETCHES = 12
"""Rows of a table that stands beside a plot."""


def _worst(errors: Sequence[float], budgets: Sequence[float]) -> tuple[float, float]:
    """The error that takes most of its budget, and that budget."""
    return max(zip(errors, budgets, strict=True), key=lambda pair: (share_of(*pair), pair[0]))


def _budgets(report: ValidationReport) -> tuple[float, ...]:
    """What was allowed at each compared position."""
    return report.position_budgets or (report.budget,) * len(report.position_errors)


def positions(report: ValidationReport) -> list[str]:
    """Error by position: plot and table."""
    errors = report.position_errors
    if not errors:
        return []
    places = report.positions or tuple(range(len(errors)))
    budgets = _budgets(report)
    length = places[-1] + 1
    marks = [
        Mark(at, error, allowed, f"position {at}: {error:.2e}", error <= allowed)
        for at, error, allowed in zip(places, errors, budgets, strict=True)
    ]
    ticks = [(float(at), f"{at:,}") for at in round_steps(length, 10)]
    plot = error_plot(
        marks,
        ticks,
        x_label="position in the row",
        y_label="largest |error| of a logit",
        title="Largest error of the logits at each position, and the budget",
        borders=window_borders(length, report.windows, report.chunk),
    )
    rows = [
        (name, figure(error), f"{allowed:.2e}", share_bar(error, allowed))
        for first, end, name in _stretches(places)
        for error, allowed in [_worst(errors[first:end], budgets[first:end])]
    ]
    columns = (("positions", "name"), ("error", "number"), ("budget", "number"), ("of budget", "share"))
    return [
        "<h2>Error by position</h2>",
        "<p>An error that grows from a multiple of the window on is a fault of the ring or of the mask.</p>",
        plot,
        _legend(_GOOD.format("within the budget"), _BAD.format("beyond it"), _borders_legend(report)),
        table("The error of each stretch that takes most of its budget", columns, rows, hidden="The same as a table"),
    ]


_GOOD = "<b class='good'>●</b>&nbsp;{}"
_TIE = "<b class='tie'>◇</b>&nbsp;{}"
_BAD = "<b class='bad'>✕</b>&nbsp;{}"


def _legend(*items: str) -> str:
    return f"<p class='legend'>{''.join(f'<span>{item}</span>' for item in items if item)}</p>"


def _borders_legend(report: ValidationReport) -> str:
    distinct = sorted({window for window in report.windows if window is not None})
    if not distinct:
        return "full attention: no window"
    names = (
        [f"W = {distinct[0]:,}"]
        if len(distinct) == 1
        else [f"W{subscript(number)} = {window:,}" for number, window in enumerate(distinct, start=1)]
    )
    return f"│ multiples of the window, {', '.join(names)}; chunk {report.chunk:,}"


def _stretches(places: Sequence[int]) -> Iterable[tuple[int, int, str]]:
    """First index, end, and the positions in words."""
    width = -(-len(places) // _STRETCHES)
    for first in range(0, len(places), width):
        end = min(first + width, len(places))
        last = places[end - 1]
        yield first, end, f"{places[first]:,} to {last:,}" if end - first > 1 else f"{last:,}"


def distributions(report: ValidationReport) -> list[str]:
    """Divergence as a histogram, and agreement of the best token by position."""
    found = report.distributions
    if found is None or not found.kl:
        return []
    near_ties = [NEAR_TIE * budget for budget in _budgets(report)] or [NEAR_TIE * report.budget] * len(found.kl)
    states = agreement_states(found, near_ties)
    same, ties, wrong = (states.count(state) for state in ("good", "tie", "bad"))
    finite = [value for value in found.kl if abs(value) < float("inf")]
    places = report.positions or tuple(range(len(states)))
    borders = window_borders(places[-1] + 1, report.windows, report.chunk)
    kl_rows = [(bin_name(span), f"{span.count:,}") for span in log_bins(found.kl)]
    stretches = [
        (name, *(f"{states[first:end].count(state):,}" for state in ("good", "tie", "bad")))
        for first, end, name in _stretches(places)
    ]
    columns = (("positions", "name"), ("the same", "number"), ("near-ties", "number"), ("others", "number"))
    verdict_words = (
        f"Both have the same best token at {same:,} of {len(states):,} positions ({same / len(states):.1%}). "
        + (f"At {ties:,} more another one is a near-tie, which is no fault: the truth's best logit leads by less than "
           "twice what is allowed there, so that an engine within it may choose the other. " if ties else "")
        + (f"At {wrong:,} the truth was decided and the engine chose otherwise." if wrong else "")
    )  # fmt: skip
    return [
        "<h2>Token agreement by position</h2>",
        f"<p>{verdict_words}</p>",
        agreement_plot(found, places, near_ties, borders),
        _legend(
            _GOOD.format("the same best token"), _TIE.format("another, a near-tie"), _BAD.format("another, decided")
        ),
        table("Best tokens of each stretch", columns, stretches, hidden="The same as a table"),
        "<h2>Divergence of the next-token distributions</h2>",
        f"<p>Kullback–Leibler divergence of the engine's distribution from the truth's at each position, in nats: "
        f"{sum(finite) / max(1, len(finite)):.1e} on average, {max(finite, default=float('inf')):.1e} at most.</p>",
        divergence_plot(found.kl),
        table("Positions by divergence", (("nats", "name"), ("positions", "number")), kl_rows,
              hidden="The same as a table"),
    ]  # fmt: skip


def modules(report: LayerReport | None) -> list[str]:
    """Error by depth: plot and table."""
    if report is None:
        return []
    last = max((module.depth for module in report.modules), default=0) + 1
    by_depth: dict[int, list[ModuleParity]] = {}
    for module in report.modules:
        by_depth.setdefault(module.depth if module.depth >= 0 else last, []).append(module)
    marks = [
        Mark(depth + index / len(same), module.error, module.budget, _tooltip(module), module.passed)
        for depth, same in by_depth.items()
        for index, module in enumerate(same)
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
    first = report.first_failure
    found = "Every module is within its budget." if first is None else f"The first module off is {first.module}."
    columns: Sequence[tuple[str, str]] = (
        ("module", "name"), ("verdict", "verdict"), ("error", "number"), ("budget", "number"),
        ("of budget", "share"),
    )  # fmt: skip
    rows = [
        (
            module.module,
            verdict("passed" if module.passed else "failed"),
            figure(module.error),
            f"{module.budget:.2e}",
            share_bar(module.error, module.budget),
        )
        for module in report.modules
    ]
    return [
        "<h2>Error by depth</h2>",
        f"<p>{escape(found)} {escape(report.what_was_done)} Dashed: the budget, which is what the reference itself "
        f"errs in {escape(report.dtype)} times the table's multiple.</p>",
        plot,
        _legend(_GOOD.format("within the budget"), _BAD.format("beyond it")),
        table("Every module", columns, rows, hidden=f"All {len(report.modules)} modules as a table"),
    ]


def _tooltip(module: ModuleParity) -> str:
    return f"{module.module}: {figure(module.error)}, {percent(module.share)} of its budget {module.budget:.2e}"
