"""The hidden folder of an export: locked while its run lives, and cleared away when it does not."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import exporter
from exporter.partial import partial_folder, remove_leftovers


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_only_leftovers_of_the_same_target_are_removed(tmp_path: Path) -> None:
    kept = [
        ".bundle.partial-short",
        ".bundle.partial-UPPERCAS",
        ".bundle.partial-abcdefgh.old",
        ".bundle2.partial-abcdefgh",
        "bundle.partial-abcdefgh",
        ".xbundle.partial-abcdefgh",
    ]
    for name in [*kept, ".bundle.partial-abcdefgh", ".bundle.partial-_2345678"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"1")
    (tmp_path / ".bundle.partial-isafile0").write_bytes(b"1")
    (tmp_path / ".bundle.partial-islink00").symlink_to(tmp_path / "bundle.partial-abcdefgh")
    remove_leftovers(tmp_path / "bundle")
    assert names(tmp_path) == sorted([*kept, ".bundle.partial-isafile0", ".bundle.partial-islink00"])
    assert (tmp_path / "bundle.partial-abcdefgh" / "weights").exists()


def test_a_running_exports_folder_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with partial_folder(out) as folder:
        remove_leftovers(out)
        assert folder.is_dir()
        with partial_folder(out) as other:
            assert other != folder
            remove_leftovers(out)
            assert len(names(tmp_path)) == 2
    assert len(names(tmp_path)) == 2
    remove_leftovers(out)
    assert names(tmp_path) == []


KILLED = """
import os, pathlib, sys
from exporter.partial import partial_folder
with partial_folder(pathlib.Path(sys.argv[1])):
    os.kill(os.getpid(), 9)
"""


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    root = Path(exporter.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "bundle"], cwd=root, check=False)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 1
    remove_leftovers(tmp_path / "bundle")
    assert names(tmp_path) == []


def test_a_folder_that_is_taken_for_a_leftover_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another export clears it away between its making and its locking."""
    real = fcntl.flock
    removed: list[Path] = []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            shutil.rmtree(removed[0])
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with partial_folder(tmp_path / "bundle") as folder:
        assert folder.is_dir()
        assert folder not in removed


def test_a_folder_that_is_removed_before_it_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempfile.mkdtemp
    removed: list[str] = []

    def mkdtemp(**options: Any) -> str:
        folder: str = real(**options)
        if not removed:
            removed.append(folder)
            Path(folder).rmdir()
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with partial_folder(tmp_path / "bundle") as folder:
        assert folder.is_dir()
        assert str(folder) not in removed


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with partial_folder(tmp_path / "bundle") as folder:
        pass
    remove_leftovers(tmp_path / "bundle")
    assert folder.is_dir()
