"""The command when its streams are closed, full, cut off, or of another encoding than UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from exporter.console import output
from tests.support.toy_bundle import write_toy_bundle

CIERZO = [sys.executable, "-m", "exporter"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"))


def shell(command: str, arguments: Sequence[str | Path], **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a shell command in which "$@" is `cierzo ARGUMENTS`."""
    return subprocess.run(
        ["sh", "-c", command, "sh", *CIERZO, *arguments],
        cwd=ROOT, env=os.environ | variables, capture_output=True, check=False,
    )  # fmt: skip


def test_a_table_whose_reader_has_gone_does_not_claim_that_parity_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError):  # rich would exit with 1
            output().print("a table")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


def test_closed_streams_change_no_exit_code(bundle: Path) -> None:
    done = shell('"$@" >&-', ["generate", bundle, "--ids", "1 2", "--max-new-tokens", "2"])
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"2 new tokens" in done.stderr
    assert shell('"$@" 2>&-', ["generate", bundle, "text, but no tokenizer"]).returncode == 2
    assert b"AttributeError" not in shell('"$@" >&-', ["inspect", bundle]).stderr


def test_a_file_that_cannot_grow_is_one_paragraph(tmp_path: Path) -> None:
    config = ROOT / "exporter" / "demo_data" / "mistral" / "config.json"
    variables = {"OUT": str(tmp_path / "out.json"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = shell('ulimit -f 0; "$@" >"$OUT"', ["inspect", config, "--json"], **variables)
    assert done.returncode == 2
    assert done.stderr == b"cierzo: the operating system refused: File too large.\n"


def test_an_encoding_without_our_characters(bundle: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = shell('"$@"', ["generate", bundle, "prompt \N{WAVY DASH}", "--json"], **ascii_only)
    assert json.loads(done.stdout.decode("ascii"))["error"]["type"] == "TokenizerError"
    config = ROOT / "exporter" / "demo_data" / "mistral" / "config.json"
    done = shell('"$@"', ["inspect", config], **ascii_only)
    assert done.returncode == 0
    assert "L?(W ? 1) + 1" in done.stdout.decode("ascii")
