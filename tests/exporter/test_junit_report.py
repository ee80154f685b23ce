"""JUnit XML: what GitLab, GitHub's actions and Jenkins read, with the report's verdicts and figures."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest

from exporter.junit_report import junit, write_junit
from exporter.layer_report import LayerReport
from exporter.validation_report import Check, ValidationReport
from runtime.errors import ExportError
from tests.support import reports

# What Jenkins' junit-10.xsd allows where we write, in its order, and what GitLab and GitHub's actions read of it.
SUITE = ("name", "tests", "failures", "errors", "skipped", "time", "timestamp")
CASE_CHILDREN = {("system-out",), ("skipped", "system-out"), ("failure", "system-out"), ("failure",)}

CASES: dict[str, tuple[ValidationReport, LayerReport | None, int, int, int]] = {
    "right": (reports.report(), None, 4, 0, 1),
    "by module": (reports.report(), reports.layers(), 5, 0, 1),
    "wrong": (reports.failing(), reports.layers(passed=False), 7, 3, 1),
    "nothing compared": (reports.empty(), None, 1, 1, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_form_is_one_that_all_readers_know(name: str) -> None:
    report, layers, tests, failures, skipped = CASES[name]
    root = ElementTree.fromstring(junit(report, layers))
    assert (root.tag, root.attrib, len(root)) == ("testsuites", {}, 1)
    (suite,) = root
    assert (suite.tag, tuple(suite.attrib)) == ("testsuite", SUITE)
    assert [child.tag for child in suite] == ["properties"] + ["testcase"] * tests
    assert all(set(item.attrib) == {"name", "value"} for item in suite[0])
    for case in suite.findall("testcase"):
        assert set(case.attrib) == {"name", "classname", "time"}
        assert float(case.attrib["time"]) >= 0
        assert tuple(child.tag for child in case) in CASE_CHILDREN
    counted = [len(suite.findall(f"testcase/{tag}")) for tag in ("failure", "skipped", "error")]
    assert counted == [failures, skipped, 0]
    assert [int(suite.attrib[name]) for name in ("tests", "failures", "skipped", "errors")] == [tests, *counted]
    passed = report.passed and (layers is None or layers.passed)
    assert (failures == 0) is passed


def test_what_it_says() -> None:
    at = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    suite = ElementTree.fromstring(junit(reports.failing(), reports.layers(passed=False), at))[0]
    assert suite.attrib["timestamp"] == "2026-03-04T05:06:07"
    assert suite.attrib["time"] == "1.500"
    properties = {item.attrib["name"]: item.attrib["value"] for item in suite[0]}
    assert properties["budget"] == "4e-06"
    assert properties["largest_error"] == "inf"
    assert properties["version.onnxruntime"] == "1.31.0"
    assert properties["engine"] == "tensorrt-1"
    cases = {case.attrib["name"]: case for case in suite.findall("testcase")}
    assert cases["prompt of 8"].attrib == {
        "name": "prompt of 8", "classname": "cierzo.onnxruntime.quick", "time": "0.250",
    }  # fmt: skip
    assert cases["uneven pieces"].findtext("system-out", "").endswith("error 1.5e-06, budget 3e-06")
    skip = cases["ragged batch"].find("skipped")
    assert skip is not None
    assert skip.attrib["message"] == "the bundle was exported for 1 row"
    failure = cases["one at a time"].find("failure")
    assert failure is not None
    assert failure.attrib["message"] == "over budget first at position 38; error 0.005, budget 4e-06"
    modules = cases["modules"].find("failure")
    assert modules is not None
    assert modules.attrib["message"] == "the first module off is layers.0.self_attn.o_proj"


def test_quality_is_among_the_properties() -> None:
    suite = ElementTree.fromstring(junit(reports.report(), None))[0]
    properties = {item.attrib["name"]: item.attrib["value"] for item in suite[0]}
    assert properties["quality.kl"] == "0.012"


def test_what_xml_has_no_place_for_is_replaced() -> None:
    evil = 'a\x00b\x1b[1m\ud800\uffff<&">\U0001f32c é'
    report = reports.report(bundle=evil, checks=(Check(evil, False, evil, 1.0),))
    suite = ElementTree.fromstring(junit(report, None))[0]
    assert suite[1].attrib["name"] == 'a?b?[1m??<&">\U0001f32c é'


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_junit(tmp_path / "report.xml", reports.report(), None)
    assert (tmp_path / "report.xml").read_bytes().startswith(b'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>')
    with pytest.raises(ExportError, match=r"The JUnit report .* cannot be written"):
        write_junit(tmp_path / "missing" / "report.xml", reports.report(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.xml"]
