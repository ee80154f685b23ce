"""The HTML report: one page that needs nothing else, says what the report says, and escapes what it is given."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exporter.html_report import html, write_html
from exporter.layer_report import LayerReport
from exporter.report_html.canvas import Scale, decades, step_of
from exporter.report_html.plots import agreement_states, divergence_plot, log_bins, window_borders
from exporter.report_html.sections import budget_words
from exporter.report_html.tables import duration, percent, share_bar
from exporter.validation_report import Check, Distributions, ValidationReport
from runtime.errors import ExportError
from tests.support import reports

VOID = frozenset({"meta", "br", "path", "line", "circle", "rect"})


class Page(HTMLParser):
    """Fails on a tag that closes another than the last one opened; collects tags and what is written."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID or tag in ("path", "circle", "rect"):
            self.open.append(tag)
        if tag in ("meta", "br", "line"):
            assert tag not in self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """All that is written, with single spaces."""
        return " ".join(" ".join(self.words).split())


CASES: dict[str, tuple[ValidationReport, LayerReport | None]] = {
    "right": (reports.report(), None),
    "right by module": (reports.report(), reports.layers()),
    "wrong": (reports.failing(), reports.layers(passed=False)),
    "nothing compared": (reports.empty(), None),
    "one position": (
        reports.report(position_errors=(1e-6,), distributions=Distributions((0.0,), (True,), (0.1,))),
        None,
    ),
    "full attention": (reports.report(windows=(None, None), chunk=1), None),
    "some positions": (reports.report(positions=tuple(range(0, 400, 10))), None),
    "two windows": (reports.report(windows=(8, 16, None)), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_page_is_well_formed_and_needs_nothing_else(name: str) -> None:
    report, layers = CASES[name]
    text = html(report, layers)
    page = Page(text)
    assert not re.search(r"(?:src|href)=|url\(|@import|https?:|<script|\bon\w+=", text)
    assert "prefers-color-scheme: dark" in text
    assert "max-width: 560px" in text
    images = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(image["role"] == "img" and image["aria-label"] for image in images)
    assert sum("narrow" in str(image["class"]) for image in images) == len(images) / 2
    passed = report.passed and (layers is None or layers.passed)
    assert ("Parity holds" in page.text) is passed
    assert ("Parity fails" in page.text) is not passed


def test_what_a_right_page_says() -> None:
    text = Page(html(reports.report(), reports.layers())).text
    for said in (
        "model.cierzo : 3 checks hold, 1 could not be run",
        "quick, seed 3",
        "onnxruntime, engine tensorrt-1",
        "8; chunk 4",
        "3.00 GiB",
        "prefill 1,234, decode 68",
        "onnxruntime 1.31.0, torch 2.13.0",
        "4 times the reference's own error",
        "The engine adds in another order",
        "ragged batch : the bundle was exported for 1 row",
        "The hash of model.safetensors : the manifest has none",
        "the same best token at 40 of 40 positions (100.0%)",
        "Against the original checkpoint on 512 tokens of this text: sample.txt",
        "perplexity × 1.010",
        "Every module is within its budget.",
    ):
        assert said in text, said
    assert "ragged batch" not in text.split("Every check that ran")[1].split("Not run")[0]


def test_what_a_wrong_page_says() -> None:
    text = Page(html(reports.failing(), reports.layers(passed=False))).text
    assert "one at a time, last tokens, modules fail; 3 checks hold" in text
    assert "Farthest beyond its budget: last tokens, with an error that is not finite." in text
    assert "At 1 more another one is a near-tie, which is no fault" in text
    assert "At 1 the truth was decided and the engine chose otherwise." in text
    assert "The first module off is layers.0.self_attn.o_proj." in text
    table = text.split("Every check that ran, failures first")[1]
    assert table.index("one at a time") < table.index("prompt of 8"), "failures come first"
    assert "Quality of the quantised weights" not in text


def test_the_heading_names_a_few_failures_only() -> None:
    checks = tuple(Check(f"check {number}", False, "", 1.0) for number in range(6))
    text = Page(html(reports.report(checks=checks), None)).text
    assert "check 0, check 1, check 2, check 3 and 2 more fail; 0 checks hold" in text


def test_an_empty_page_is_no_success() -> None:
    text = Page(html(reports.empty(), None)).text
    assert "nothing was compared" in text
    assert "not finite" not in text, "nothing was measured"


def test_names_are_escaped() -> None:
    evil = "<b onload=x>&'\""
    report = reports.report(
        bundle=f"/x/{evil}", checkpoint=evil, device=evil, engine=evil, versions={evil: evil}, unverified=(evil,)
    )
    report = replace(report, checks=(Check(evil, False, evil, 1.0), Check(evil, None, evil)))
    page = Page(html(report, None))
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert page.text.count(evil) >= 8


def test_what_cannot_be_seen_is_replaced() -> None:
    evil = "a\x00b\x1b[1m\x85\u202ec\ud800"
    text = html(reports.report(bundle=f"/x/{evil}", checks=(Check(evil, False, evil, 1.0),)), None)
    assert "a\ufffdb\ufffd[1m\ufffd\ufffdc\ufffd" in text
    assert all(char == "\n" or char.isprintable() for char in text.replace("\xa0", " "))
    text.encode("utf-8")


@pytest.mark.parametrize("named", [".", "folder/.."])
def test_a_bundle_that_is_named_by_where_one_stands_has_a_name(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = html(reports.report(bundle=named), None)
    assert f"<title>Parity holds: {tmp_path.name}</title>" in text
    assert f"<b>{tmp_path.name}</b>" in text


def test_every_table_is_one_for_those_who_hear_it_and_every_plot_has_one() -> None:
    page = Page(html(reports.report(), reports.layers()))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") == 5
    assert tags.count("figure") == tags.count("details") - 1, "each plot has a table, and the budget its reason"
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    assert all(attributes.get("role") == "cell" for tag, attributes in page.tags if tag == "td")


def test_plots_mark_windows_and_chunks() -> None:
    text = html(reports.report(windows=(8, 16, None), distributions=None), None)
    wide = text.split("<svg")[1]
    # In the order of places; 40 tokens hold 8, 16, 24, 32 and 16, 32.
    assert re.findall(r'class="window-text"[^>]*>([^<]*)<', wide) == ["W₁", "2W₁ = W₂", "3W₁", "4W₁ = 2W₂"]
    assert wide.count('class="chunk"') == 9


def test_borders_of_long_rows_are_few() -> None:
    borders = window_borders(100_000, (4096, 32), 16)
    windows = [text for _, text, style in borders if style == "window"]
    assert 2 <= len(windows) <= 20
    assert "W₁" in windows
    assert not any(style == "chunk" for _, _, style in borders)
    assert all(place < 100_000 for place, _, _ in borders)


def test_a_long_row_keeps_its_worst_position() -> None:
    errors = [1e-6] * 20_000
    errors[12_345] = 1.0
    text = html(reports.report(position_errors=tuple(errors), distributions=None), None)
    assert text.count('<path class="bad"') == 2, "one in each shape"
    assert "position 12345: 1.00e+00" in text
    assert text.count("<circle") < 1500


def test_positions_that_were_left_out_keep_their_places() -> None:
    text = html(reports.report(positions=tuple(range(0, 400, 10)), distributions=None), None)
    assert "position 390: " in text
    assert ">10W<" in text
    assert "360 to 390" in text


@pytest.mark.parametrize(
    ("length", "most", "step"), [(1, 5, 1), (5, 5, 1), (6, 5, 2), (50, 5, 10), (51, 5, 20), (999, 10, 100)]
)
def test_steps_are_round(length: int, most: int, step: int) -> None:
    assert step_of(length, most) == step


def test_counts_stand_at_round_steps() -> None:
    plot = divergence_plot((1e-9,) * 813).split("</svg>")[0]
    assert re.findall(r'text-anchor="end">([^<]*)<', plot) == ["0", "200", "400", "600", "800"]
    one = divergence_plot((1e-9,)).split("</svg>")[0]
    assert re.findall(r'text-anchor="end">([^<]*)<', one) == ["0", "1"]


def test_scales() -> None:
    scale = decades([3e-7, 2e-4, 0.0, float("inf")])
    assert (scale.low, scale.high) == (1e-7, 1e-3)
    assert scale(0.0) == 0.0
    assert scale(float("inf")) == scale(float("nan")) == 1.0
    assert scale(1e-5) == pytest.approx(0.5)
    assert Scale(2, 2)(2) == 0.0
    assert decades([]).high > 0


def test_bins_count_every_value_once() -> None:
    values = [0.0, -1e-17, 1e-12, 1.1e-12, 5e-10, float("inf"), float("nan"), 1e-9]
    bins = log_bins(values)
    assert sum(span.count for span in bins) == len(values)
    assert (bins[0].low, bins[0].count) == (None, 2)
    assert (bins[-1].high, bins[-1].count) == (None, 2)
    for span in bins[1:-1]:
        assert span.low is not None
        assert span.high is not None
        assert span.count == sum(span.low <= value * (1 + 1e-9) < span.high for value in values)
    assert log_bins([]) == []


def test_near_ties() -> None:
    found = Distributions(kl=(0.0,) * 4, same_best=(True, False, False, False), margin=(0.0, 1e-6, 1e-3, 1e-3))
    assert agreement_states(found, (1e-5, 1e-5, 1e-5, 1e-2)) == ["good", "tie", "bad", "tie"]


def test_a_budget_says_where_it_comes_from() -> None:
    own = reports.report()
    assert "4e-06" in f"{own.budget}"
    assert budget_words(own).endswith("4 times the reference's own error.")
    floor = reports.report(reference_error=1e-9)
    assert "16 roundings (ε = 1.2e-07) of the largest logit" in budget_words(floor)
    ceiling = reports.report(reference_error=1.0, budget=2e-4)
    assert budget_words(ceiling).endswith("0.0001 of the largest logit, the most that is ever allowed.")
    assert "4.00e-06." in budget_words(reports.report(dtype="another"))


def test_figures_for_a_person() -> None:
    assert [percent(share) for share in (0.0, 0.5, 1.0, 1.001, 9.0, 37.0, 1e7, float("inf"))] == [
        "0 %", "50 %", "100 %", "> 100 %", "900 %", "37 ×", "1e+07 ×", "not finite",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (1e-4, 0.004, 3.2, 600, 8000)] == [
        "< 1 ms",
        "4 ms",
        "3.2 s",
        "10 min",
        "2.2 h",
    ]
    assert share_bar(None, 1.0).text == ""
    assert "over" in share_bar(1.0, 0.0).text
    assert "width:0.0%" in share_bar(0.0, 0.0).text
    assert share_bar(float("nan"), 1.0) == share_bar(float("inf"), 0.0)
    assert "not finite" in share_bar(float("nan"), 1.0).text


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    write_html(target, reports.report(bundle="/x/\udcff.cierzo"), None)
    first = target.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>")
    assert target.stat().st_mode & 0o777 == 0o644

    def full(self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ExportError, match="No space left"):
        write_html(target, reports.failing(), None)
    assert target.read_text(encoding="utf-8") == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
