"""Small files are written whole or not at all, and nothing is replaced that is no file."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from exporter.whole_file import refuse_unwritable, write_whole
from runtime.errors import ExportError


def test_a_file_is_replaced_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.json", tmp_path / "link.json"
    real.write_text("before")
    link.symlink_to(real)
    refuse_unwritable(link, "The baseline")
    assert real.read_text() == "before"
    write_whole(link, "after é\n", "The baseline")
    assert link.is_symlink()
    assert real.read_bytes() == "after é\n".encode()
    assert [path.name for path in real.parent.iterdir()] == ["real.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link.json"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    refuse_unwritable(pipe, "The report")  # neither waits for a reader nor replaces it
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "text", "The report")
    reader.join(10)
    assert read == ["text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing/report.html", "No such file"),
        ("file/report.html", "Not a directory"),
        ("folder", "Is a directory"),
        ("a" * 300, "File name too long"),
        ("a\0b", "null"),
    ],
)
def test_what_cannot_be_written_is_known_before(tmp_path: Path, name: str, cause: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match=f"The report .*{cause}"):
        refuse_unwritable(tmp_path / name, "The report")
    with pytest.raises(ExportError, match=f"The report .*{cause}"):
        write_whole(tmp_path / name, "", "The report")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
