"""The report of a validation as JUnit XML, which GitLab, GitHub's actions and Jenkins show beside the tests.

Only what all readers know is written: one suite, a case for each check, a failure with a message, a skip with a reason.
Figures of the run are the suite's properties, those of a check its output. The form is that of Jenkins' JUnit schema
(github.com/jenkinsci/xunit-plugin, junit-10.xsd), without attributes that only some versions of it have.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from exporter.layer_report import LayerReport
from exporter.validation_report import Check, ValidationReport
from exporter.whole_file import JUNIT, write_whole

MODULES = "modules"
"""The case that stands for the comparison by module."""

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for, not even escaped (section 2.2, Char): a path may hold it."""


def write_junit(path: Path, report: ValidationReport, layers: LayerReport | None) -> None:
    """Write the report to `path`, whole or not at all. Raises ExportError when the file cannot be written."""
    write_whole(path, junit(report, layers), JUNIT)


def junit(report: ValidationReport, layers: LayerReport | None, at: datetime | None = None) -> str:
    """The document. layers: the comparison by module, if there was one. at: when it ran, by default now."""
    cases = [_case(report, check) for check in report.checks]
    if layers is not None:
        cases.append(_modules(report, layers))
    failed = sum(case.find("failure") is not None for case in cases)
    if not report.passed and not failed:  # nothing was compared, which is no success
        cases.append(_element("testcase", name="parity", classname=_group(report), time="0.000"))
        cases[-1].append(
            _element("failure", "No check compared logits.", message="nothing was compared", type="parity")
        )
        failed = 1
    suite = _element(
        "testsuite",
        name=f"cierzo validate {Path(os.path.abspath(report.bundle)).name}",
        tests=str(len(cases)),
        failures=str(failed),
        errors="0",
        skipped=str(sum(case.find("skipped") is not None for case in cases)),
        time=f"{report.seconds:.3f}",
        timestamp=(at or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
    )
    properties = _element("properties")
    for name, value in _properties(report).items():
        properties.append(_element("property", name=name, value=value))
    suite.extend([properties, *cases])
    root = _element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _properties(report: ValidationReport) -> dict[str, str]:
    found = {
        "bundle": report.bundle,
        "checkpoint": report.checkpoint,
        "suite": report.suite,
        "seed": str(report.seed),
        "backend": report.backend,
        "engine": report.engine or "",
        "device": report.device,
        "dtype": report.dtype,
        "budget": repr(report.budget),
        "reference_error": repr(report.reference_error),
        "largest_error": repr(report.largest_error),
        "largest_logit": repr(report.largest_logit),
        "peak_bytes": str(report.peak_bytes),
        "prefill_tokens_per_second": "" if report.speed.prefill is None else f"{report.speed.prefill:.6g}",
        "decode_tokens_per_second": "" if report.speed.decode is None else f"{report.speed.decode:.6g}",
    }
    if report.quality is not None:
        found |= {f"quality.{name}": str(value) for name, value in report.quality.to_json().items()}
    return found | {f"version.{name}": version for name, version in report.versions.items()}


def _group(report: ValidationReport) -> str:
    return f"cierzo.{report.backend}.{report.suite}"


def _case(report: ValidationReport, check: Check) -> ElementTree.Element:
    case = _element("testcase", name=check.name, classname=_group(report), time=f"{check.seconds:.3f}")
    allowed = report.budget_of(check)
    figures = [f"error {check.error!r}, budget {allowed!r}"] if check.error is not None else []
    if check.passed is None:
        case.append(_element("skipped", message=check.detail))
    elif not check.passed:
        text = "\n".join([check.detail, *figures])
        case.append(_element("failure", text, message="; ".join([check.detail, *figures]), type="parity"))
    case.append(_element("system-out", "\n".join([check.detail, *figures])))
    return case


def _modules(report: ValidationReport, layers: LayerReport) -> ElementTree.Element:
    case = _element("testcase", name=MODULES, classname=_group(report), time="0.000")
    if not layers.passed:
        off = [module for module in layers.modules if not module.passed]
        lines = [f"{module.module}: error {module.error!r}, budget {module.budget!r}" for module in off]
        first = layers.first_failure
        message = "no module was compared" if first is None else f"the first module off is {first.module}"
        case.append(_element("failure", "\n".join(lines), message=message, type="parity"))
    case.append(_element("system-out", layers.what_was_done))
    return case


def _element(tag: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    made = ElementTree.Element(tag, {name: _NOT_XML.sub("?", value) for name, value in attributes.items()})
    made.text = None if text is None else _NOT_XML.sub("?", text)
    return made
