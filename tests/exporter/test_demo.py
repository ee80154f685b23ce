"""The demo is the main job; it runs here as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from exporter.cli import cli
from exporter.demo import run_demo
from runtime import load
from runtime.errors import ExportError


def test_the_demo_goes_from_checkpoint_to_verdict(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["demo", "--model", "mistral", "--keep", str(tmp_path / "kept")])
    assert result.exit_code == 0, result.output
    for stage in ("inspect", "export", "generate", "validate", "Summary", "Parity holds"):
        assert stage in result.stdout
    session = load(tmp_path / "kept" / "mistral")
    assert session.tokenizer.decode(list(session.generate(session.tokenizer.encode("One windy"), max_new_tokens=3)))


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not empty"):
        run_demo(Console(quiet=True), models=("mistral",), keep=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
