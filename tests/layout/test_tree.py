"""Rules for the files themselves: short enough to be read in one go, and at home on every machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.layout.imports import OURS, ROOT

LONGEST = 330  # lines: about one concept, and what a reader holds in mind at once
SOURCES = frozenset({".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h"})
TEXTS = SOURCES | {".md", ".toml", ".yaml", ".yml", ".json", ".cfg", ".ini", ".sh", ".txt", ".jinja", ""}
GENERATED = frozenset({".git", ".venv", "__pycache__", "build", "dist"})
# Folders that exist on one machine only: a source that names one is wrong on every other.
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:tmp|work|opt|root|farm|home|Users)/[\w.]")


def our_files(suffixes: frozenset[str]) -> Iterator[Path]:
    """The files of the repository with one of these suffixes, without what tools and runs leave behind."""
    tops = [*OURS, "tests", "benchmarks", "docs", ".ci"]
    candidates = [path for path in ROOT.iterdir() if path.is_file()]
    candidates += [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]
    for path in candidates:
        parts = path.relative_to(ROOT).parts
        if path.suffix in suffixes and not any(part in GENERATED or part.endswith("_cache") for part in parts):
            yield path


def machine_paths(text: str) -> list[str]:
    """The paths in `text` that belong to one machine."""
    return [match.group() for match in MACHINE_PATH.finditer(text)]


def test_no_source_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in our_files(SOURCES)}
    assert len(lengths) > len(OURS)
    too_long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST}
    assert not too_long, f"longer than {LONGEST} lines, so more than one concept: {too_long}"


def test_no_file_names_a_path_of_one_machine() -> None:
    this = Path(__file__)
    texts = {path: path.read_text(encoding="utf-8") for path in our_files(TEXTS) if path != this}
    found = {str(path.relative_to(ROOT)): paths for path, text in texts.items() if (paths := machine_paths(text))}
    assert not found


@pytest.mark.parametrize("text", ["open('/tmp/x')", "see /work/notes", "PATH=/root/.cache", "`/home/me/model`"])
def test_the_search_finds(text: str) -> None:
    assert machine_paths(text)


@pytest.mark.parametrize("text", ["https://a.org/home/me", "tests/work/x", "$HOME/tmp/x", "~/opt/x", "a /tmpfs/ b"])
def test_the_search_lets_pass(text: str) -> None:
    assert machine_paths(text) == []
