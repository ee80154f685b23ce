"""Writing a bundle: whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter.save import absolute, bundle_folder, refuse_existing, refuse_full_disk, refuse_names, write_manifest
from runtime.errors import ExportError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with bundle_folder(out) as folder:
        (folder / "a").write_bytes(b"1")
        assert folder.parent == tmp_path, "a rename is atomic within one file system only"
        assert folder.name.startswith(".bundle.partial-")
        assert not out.exists()
        (folder / "b").write_bytes(b"2")
    assert names(tmp_path) == ["bundle"]
    assert names(out) == ["a", "b"]
    assert out.stat().st_mode & 0o055 == 0o055, "others may read it, unlike a temporary folder"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with bundle_folder(tmp_path / "bundle") as folder:
            (folder / "a").write_bytes(b"1")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == []


def test_a_bundle_that_appeared_meanwhile_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def write() -> None:
        with bundle_folder(out) as folder:
            (folder / "a").write_bytes(b"mine")
            out.mkdir()  # empty: a rename alone would replace it

    with pytest.raises(ExportError, match="exists already"):
        write()
    assert names(tmp_path) == ["bundle"]
    assert names(out) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_whatever_is_at_the_target_is_refused(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "bundle"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"bundle exists already\. Choose another folder"):
        refuse_existing(out)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_the_parent_must_be_a_folder(tmp_path: Path, kind: str) -> None:
    parent = tmp_path / "parent"
    if kind == "file":
        parent.write_text("")
    with pytest.raises(ExportError, match="parent is not a folder, so bundle cannot be made in it"):
        refuse_existing(parent / "bundle")


@pytest.mark.parametrize("length", [241, 300])
def test_a_name_that_is_too_long_with_what_hides_it(tmp_path: Path, length: int) -> None:
    refuse_existing(tmp_path / ("n" * (255 - len("..partial-xxxxxxxx"))))
    with pytest.raises(ExportError, match=r"cannot be made: File name too long\. Choose"):
        refuse_existing(tmp_path / ("n" * length))
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root has every right
    with pytest.raises(ExportError, match="cannot be written to, so bundle cannot be made in it"):
        refuse_existing(tmp_path / "bundle")


@pytest.mark.parametrize("name", [b"a\xff", b"a\0b"])
def test_a_path_that_no_bundle_can_name(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    with pytest.raises(ExportError, match=r"is not UTF-8 text, so that nothing in a bundle can name it") as caught:
        refuse_names([tmp_path, path])
    str(caught.value).encode()
    refuse_names([tmp_path / "ünïcödé-日本 \n"])


def test_a_link_to_a_path_that_no_bundle_can_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(os.fsdecode(b"a\xff"))
    with pytest.raises(ExportError, match="is not UTF-8 text"):
        refuse_names([tmp_path / "link"])


def test_the_home_of_nobody() -> None:
    assert absolute("a") == Path("a").absolute()
    with pytest.raises(ExportError, match="'~nobody-of-that-name/b' names the home of a user who is not there"):
        absolute("~nobody-of-that-name/b")


def test_a_full_disk_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000_000))
    refuse_full_disk(tmp_path / "bundle", 3_000_000_000)
    with pytest.raises(ExportError, match=r"needs 14\.48 GB and the disk of .* has 3\.00 GB left"):
        refuse_full_disk(tmp_path / "bundle", 14_480_000_000)


def test_the_manifest_is_readable_json_in_the_order_given(tmp_path: Path) -> None:
    manifest = {"z": 1, "a": {"name": "Élan", "none": None}}
    write_manifest(tmp_path, manifest)
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text) == manifest
    assert list(json.loads(text)) == ["z", "a"]
    assert "Élan" in text
    assert text.endswith("}\n")
