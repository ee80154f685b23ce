"""The report of a validation as one HTML file that needs nothing else: verdict, plots, tables. No scripts."""

from __future__ import annotations

import os
import re
from html import escape
from pathlib import Path

from exporter.layer_report import LayerReport
from exporter.report_html import drawn, sections
from exporter.report_html.style import STYLE
from exporter.validation_report import ValidationReport
from exporter.whole_file import REPORT, write_whole

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which HTML forbids, and marks of direction, by which a name could turn the words around it."""


def write_html(path: Path, report: ValidationReport, layers: LayerReport | None) -> None:
    """Write the report to `path`, whole or not at all. Raises ExportError when the file cannot be written."""
    write_whole(path, html(report, layers), REPORT)


def html(report: ValidationReport, layers: LayerReport | None) -> str:
    """The whole page. layers: the comparison by module, if there was one."""
    passed = report.passed and (layers is None or layers.passed)
    title = f"{'Parity holds' if passed else 'Parity fails'}: {escape(Path(os.path.abspath(report.bundle)).name)}"
    body = [
        *sections.heading(report, layers),
        *sections.checks(report),
        *drawn.positions(report),
        *drawn.modules(layers),
        *drawn.distributions(report),
        *sections.quality(report.quality),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    return _UNSEEN.sub("\ufffd", page)
