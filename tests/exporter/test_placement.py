"""Linked, or left in one folder, or refused: never in between."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from exporter.placement import foresee, place
from runtime.errors import ExportError


@pytest.fixture
def hub(tmp_path: Path) -> list[Path]:
    """Two shards of a hub cache: symbolic links with readable names to blobs that have none."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number in (1, 2):
        (blobs / f"{number:064x}").write_bytes(bytes([number]))
        (snapshot / f"model-{number}.safetensors").symlink_to(blobs / f"{number:064x}")
    return sorted(snapshot.iterdir())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    return tmp_path / "bundle"


def refuse_links(monkeypatch: pytest.MonkeyPatch, code: int, after: int = 0) -> None:
    """From now on os.link works `after` times and then fails with `code`."""
    real, calls = os.link, []

    def link(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        real(source, target)

    monkeypatch.setattr(os, "link", link)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_links_carry_the_readable_names_and_are_the_files_themselves(hub: list[Path], bundle: Path) -> None:
    placement = place(hub, bundle, taken=["model.onnx"])
    assert placement.kind == "linked"
    assert placement.folder is None
    assert placement.names == {file: file.name for file in hub}
    assert names(bundle) == [file.name for file in hub]
    for file in hub:
        assert (bundle / file.name).samefile(file)
        assert not (bundle / file.name).is_symlink()


def test_two_files_of_one_name_get_the_names_of_their_blobs(hub: list[Path], bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / hub[0].name
    twin.symlink_to(tmp_path / "blobs" / f"{2:064x}")
    placement = place([hub[0], twin], bundle, taken=[])
    assert placement.names == {hub[0]: f"{1:064x}", twin: f"{2:064x}"}


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS])
@pytest.mark.parametrize("after", [0, 1])
def test_where_links_are_refused_the_folder_of_the_real_files_is_named(
    hub: list[Path], bundle: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int
) -> None:
    refuse_links(monkeypatch, code, after)
    placement = place(hub, bundle, taken=[])
    assert placement.kind == "folder"
    assert placement.folder == hub[0].resolve().parent
    assert placement.names == {file: file.resolve().name for file in hub}
    assert names(bundle) == [], "never in part"


def test_any_other_error_is_one(hub: list[Path], bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch, errno.ENOSPC, after=1)
    with pytest.raises(OSError, match="No space left"):
        place(hub, bundle, taken=[])
    assert names(bundle) == []


def test_files_in_several_folders_that_cannot_be_linked_are_refused(
    hub: list[Path], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    refuse_links(monkeypatch, errno.EXDEV)
    with pytest.raises(ExportError, match=r"\(Invalid cross-device link\), .* they lie in 2 folders .* Pass --copy"):
        place([*hub, tmp_path / "elsewhere"], bundle, taken=[])
    assert names(bundle) == []


def test_a_name_that_the_bundle_needs_itself_is_refused(hub: list[Path], bundle: Path) -> None:
    with pytest.raises(ExportError, match=r"model-2\.safetensors cannot be referenced, .* Pass --copy"):
        place(hub, bundle, taken=["model-2.safetensors"])
    assert names(bundle) == []


def test_a_real_name_that_the_bundle_needs_itself_is_refused(
    hub: list[Path], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob's name, which a bundle without links would refer to, is that of another file there."""
    refuse_links(monkeypatch, errno.EXDEV)
    with pytest.raises(ExportError, match=rf"{1:064x} cannot be referenced, .* Pass --copy"):
        place(hub, bundle, taken=[f"{1:064x}"])
    assert names(bundle) == []


def test_another_disk_is_foreseen(hub: list[Path], bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    scattered = [*hub, tmp_path / "elsewhere"]
    foresee(scattered, bundle)  # they can be linked, so it does not matter where they lie
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        other = Path("/proc")
    foresee(hub, other / "bundle")
    with pytest.raises(ExportError, match="they lie in 2 folders"):
        foresee(scattered, other / "bundle")
