"""What of the script for a GPU is asked for: sections, their share of the time, and the report that they end in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import parts, report, script
from tests.gpu.findings import Check, Finding
from tests.gpu.parts import ENGINE, KERNELS, ONNXRUNTIME, PLUGINS, SECTIONS, SPEED


def options(*only: str) -> script.Options:
    return script.Options(Path("out"), False, only, None, 1)


def test_every_section_has_its_share_of_the_time() -> None:
    assert script.SHARES.keys() == set(SECTIONS)
    assert sum(script.SHARES.values()) == pytest.approx(1)
    assert {part.section for part in parts.PARTS} == set(SECTIONS)
    ends = [options().until(section) for section in SECTIONS]
    assert ends == sorted(ends)
    assert ends[-1] == pytest.approx(1)
    assert options(ONNXRUNTIME).until(ONNXRUNTIME) == 1, "alone it has all of it"
    both = options(ONNXRUNTIME, SPEED)
    assert both.sections == (SPEED, ONNXRUNTIME), "ceilings come first"
    assert both.until(SPEED) == pytest.approx(0.15 / 0.6)


def test_the_whole_script_ends_within_nine_minutes() -> None:
    assert script.WHOLE_SECONDS + script._GRACE <= 540


@pytest.mark.parametrize(
    ("sections", "name"), [(SECTIONS, "gpu"), ((ONNXRUNTIME,), "onnxruntime_cuda"), ((PLUGINS, ENGINE), "gpu")]
)
def test_a_section_that_is_run_alone_replaces_no_other_report(sections: tuple[str, ...], name: str) -> None:
    assert report.report_name(sections) == name


def test_what_a_part_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of a run share a folder, which is gone afterwards; a section that fails does not keep others back."""
    commands: list[list[str]] = []

    def ended(command: list[str], seconds: float) -> str | None:
        commands.append(command)
        assert 0 < seconds <= script.WHOLE_SECONDS + script._GRACE
        (Path(command[command.index("--work") + 1]) / "left").touch()
        return "the process ended with 1"

    monkeypatch.setattr(script, "_ended", ended)
    arguments = ["--rehearsal", "--only", ONNXRUNTIME, ENGINE, "--out", str(tmp_path), "--bundle", str(tmp_path)]
    assert script.main(arguments) == report.FAILED
    told = [command[command.index("--part") + 1] for command in commands]
    expected = [f"{part.name}:0" for part in parts.PARTS if part.section in (ENGINE, ONNXRUNTIME)]
    assert told == expected
    works = {command[command.index("--work") + 1] for command in commands}
    assert len(works) == 1
    assert not Path(works.pop()).exists()
    assert all("--rehearsal" in command and str(tmp_path) in command for command in commands)
    assert "**engine, the part engine**: the process ended with 1" in (tmp_path / "gpu.md").read_text()


def test_libraries_of_packages_are_found_by_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu lies apart from them on a machine that it was carried to."""
    libraries = tmp_path / "site" / "nvidia" / "cu13" / "lib"
    libraries.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "carried"), str(tmp_path / "site"), str(tmp_path / "site")])
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert script._environment()["LD_LIBRARY_PATH"] == str(libraries)
    monkeypatch.setenv("LD_LIBRARY_PATH", "first")
    assert script._environment()["LD_LIBRARY_PATH"] == f"first:{libraries}"


def test_sections_end_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: dict[str, float] = {}

    def spawned(part: parts.Part, share: int, given: Any, capability: Any, end: float, known: Any) -> list[Finding]:
        ends[part.section] = end
        return [Check(part.section, part.name, True)]

    monkeypatch.setattr(script, "_spawned", spawned)
    assert script.main(["--rehearsal", "--only", *SECTIONS[1:], "--out", str(tmp_path)]) == report.HELD
    assert list(ends) == list(SECTIONS[1:])
    assert KERNELS not in ends
    assert list(ends.values()) == sorted(ends.values())
    assert ends[ONNXRUNTIME] - ends[ENGINE] == pytest.approx(script.WHOLE_SECONDS * 0.45 / 0.75, abs=1)
