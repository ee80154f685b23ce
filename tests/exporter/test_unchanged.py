"""A checkpoint that becomes another while it is exported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from exporter import export
from exporter.unchanged import require_unchanged, states_of
from reference.checkpoint import SINGLE_FILE
from runtime.errors import ExportError
from tests.support.bundles import checkpoint, shared_traces


def replaced(file: Path) -> bytes:
    """A file of the same size with other values."""
    doubled = {name: tensor * 2 for name, tensor in load_file(file).items()}
    save_file(doubled, file.with_name("other"), metadata={"format": "pt"})
    content = file.with_name("other").read_bytes()
    file.with_name("other").unlink()
    return content


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("stage", "options"),
    [("tracing", {}), ("hashing", {}), ("tracing", {"copy": True}), ("writing weights", {"copy": True})],
)
def test_a_shard_that_is_replaced_by_one_of_its_size_is_noticed(
    tmp_path: Path, stage: str, options: dict[str, Any], in_place: bool
) -> None:
    source = shutil.copytree(checkpoint(dtype="bfloat16"), tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    file, other = source / SINGLE_FILE, replaced(source / SINGLE_FILE)
    assert len(other) == file.stat().st_size
    calls: list[str] = []

    def replace(reported: str, done: int, total: int) -> None:
        if reported == stage and not calls:
            calls.append(stage)
            if in_place:
                file.write_bytes(other)
            else:
                (source / "new").write_bytes(other)
                os.replace(source / "new", file)

    with shared_traces(), pytest.raises(ExportError, match=r"model\.safetensors was changed or replaced while it was"):
        export(source, tmp_path / "out" / "bundle", chunk=4, prove=False, progress=replace, **options)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_config_that_changes_is_noticed(tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(), tmp_path / "checkpoint")

    def change(stage: str, done: int, total: int) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))

    with shared_traces(), pytest.raises(ExportError, match=r"config\.json was changed or replaced while it was"):
        export(source, tmp_path / "bundle", chunk=4, prove=False, progress=change)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_file_that_goes_is_noticed_and_a_link_is_no_change(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    before = states_of([file])
    os.link(file, tmp_path / "link")
    require_unchanged(before)
    file.unlink()
    with pytest.raises(ExportError, match=r"file can no longer be found \(No such file or directory\) while"):
        require_unchanged(before)
