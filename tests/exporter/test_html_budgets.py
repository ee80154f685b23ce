"""The HTML report where not all positions, nor all checks, have the same budget, as behind a router's near-ties."""

from __future__ import annotations

import re
from dataclasses import replace

from exporter.html_report import html
from exporter.report_html.canvas import NARROW, WIDE
from exporter.report_html.sections import budget_words
from exporter.validation_report import Check, Distributions, ValidationReport
from tests.exporter.test_html_report import Page
from tests.support import reports
from tests.support.reports import BUDGET, TOKENS

ROOM = 1e-2
"""Allowed from the middle of the row on."""


def mixture() -> ValidationReport:
    """A right run in which the second half may be off by much more, is, and chose another best token there."""
    half = TOKENS // 2
    errors = (BUDGET / 2,) * half + (ROOM / 4,) * half
    return reports.report(
        checks=(
            Check("prompt of 8", True, "whole prompt, all positions", BUDGET / 2, budget=BUDGET),
            Check("long roll", True, "the last tokens", ROOM / 4, budget=ROOM),
        ),
        position_errors=errors,
        position_budgets=(BUDGET,) * half + (ROOM,) * half,
        distributions=Distributions((1e-9,) * TOKENS, (True,) * half + (False,) * half, (ROOM,) * TOKENS),
    )


def test_shares_are_of_the_budget_that_holds_there() -> None:
    report = mixture()
    assert report.passed
    assert report.largest_error > 100 * report.budget
    text = Page(html(report, None)).text
    assert "2 checks hold. Nearest to its budget: prompt of 8, with an error of 2.00e-06, 50 % of what is" in text
    assert "behind it, the budget is what that choice costs, which was measured: up to 1.00e-02." in text
    assert {share for share in re.findall(r"(\d+) %", text)} == {"50", "25"}
    assert "budgets of their own" not in text


def test_other_budgets_are_told_from_those_of_routers() -> None:
    """A long roll has other tokens and so a budget of its own, in a dense model too."""
    roll = Check("long roll", True, "the last tokens", BUDGET, budget=3 * BUDGET)
    text = budget_words(reports.report(checks=(*reports.report().checks, roll)))
    assert "router" not in text
    assert "Checks that feed other tokens have budgets of their own, made in the same way: up to 1.20e-05." in text
    alone = budget_words(reports.report())
    assert "router" not in alone
    assert "of their own" not in alone


def test_a_stretch_shows_the_error_that_takes_most_of_its_budget() -> None:
    report = mixture()
    half = TOKENS // 2
    errors = (BUDGET / 2,) * (half - 1) + (0.8 * BUDGET,) + (ROOM / 4,) * half
    text = Page(html(replace(report, position_errors=errors, distributions=None), None)).text
    row = text.split("16 to 19", 1)[1].split("20 to", 1)[0]
    assert row.split() == ["3.20e-06", "4.00e-06", "80", "%"]


def test_a_near_tie_is_one_by_the_budget_that_holds_there() -> None:
    text = html(mixture(), None)
    assert "another one is a near-tie, which is no fault" in text
    assert "the truth was decided" not in text
    plot = text.split("best token leads at each position", 1)[1].split("</svg>", 1)[0]
    (line,) = re.findall(r'class="allowed" d="([^"]*)"', plot)
    heights = {point.split()[1] for point in line.removeprefix("M").split("H")[0].split("L")}
    assert len(heights) == 2
    strict = html(replace(mixture(), position_budgets=()), None)
    assert "At 20 the truth was decided and the engine chose otherwise." in strict


def test_a_page_stays_small_however_much_is_wrong() -> None:
    count = 20_000
    found = Distributions((float("inf"),) * count, (False,) * count, (1.0,) * count)
    report = reports.report(position_errors=(float("inf"),) * count, distributions=found)
    text = html(report, None)
    assert text.count('<path class="bad"') <= 2 * (WIDE.most + NARROW.most)
    assert len(text) < 1_000_000
    assert f"At {count:,} the truth was decided" in text
