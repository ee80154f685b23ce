"""docs/manifest.schema.json describes every manifest that an export writes, and every key of it."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from exporter import export
from exporter.hashing import own_entry
from runtime.manifest import SCHEMA_VERSION
from tests.layout.imports import ROOT
from tests.support.bundles import checkpoint, exported, shared_traces
from tests.support.native import as_native

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def manifest_of(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def complaints(manifest: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(manifest)]


def made(source: Path, out: Path, **options: Any) -> Path:
    with shared_traces():
        return export(source, out, chunk=4, **options)


def native_and_unproved(folder: Path) -> Path:
    source = as_native(checkpoint(dtype="bfloat16"), folder / "native")
    return made(source, folder / "bundle", prove=False, hashes=False)


def in_its_folder(folder: Path) -> Path:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", link)
        return made(checkpoint(dtype="float16", architecture="mixtral"), folder / "bundle")


KINDS: dict[str, Callable[[Path], Path]] = {
    "linked, with a tokenizer": lambda folder: exported(chunk=4, tokenizer=True).bundle,
    "full attention": lambda folder: (
        exported(chunk=3, context=20, architecture="ministral", num_layers=4, layer_windows=[None, 4, 4, None]).bundle
    ),
    "native, without proofs and hashes": native_and_unproved,
    "copied": lambda folder: made(checkpoint(dtype="bfloat16"), folder / "bundle", copy=True),
    "converted": lambda folder: made(checkpoint(dtype="bfloat16"), folder / "bundle", weights="fp32"),
    "in its folder": in_its_folder,
    "quantised": lambda folder: made(
        checkpoint(dtype="bfloat16"), folder / "bundle", weights="int4", zero_points=True, keep=["lm_head=int8"]
    ),
}


def test_the_schema_is_one_of_this_version() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_is_as_described(tmp_path: Path, name: str) -> None:
    assert complaints(manifest_of(KINDS[name](tmp_path))) == []


def test_every_key_has_a_description() -> None:
    def walk(schema: dict[str, Any], path: str) -> Iterator[str]:
        if "description" not in schema and "const" not in schema and path.rsplit(".", 1)[-1] != "[]":
            yield path
        for key, inner in schema.get("properties", {}).items():
            yield from walk(inner, f"{path}.{key}")
        if isinstance(schema.get("items"), dict):
            yield from walk(schema["items"], f"{path}.[]")

    assert list(walk(SCHEMA, "manifest")) == []


def test_engines_are_described(tmp_path: Path) -> None:
    manifest = copy.deepcopy(manifest_of(exported(chunk=4).bundle))
    (tmp_path / "engine.json").write_bytes(b"{}")
    manifest["engines"] = {"tensorrt-1": own_entry(tmp_path / "engine.json")}
    assert complaints(manifest) == []


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a key less": lambda m: m["kv"].pop("position_limit"),
    "a key more": lambda m: m["weights"].update(dtype="fp32"),
    "another version": lambda m: m.update(schema_version=1),
    "a number as text": lambda m: m["model"].update(hidden_size="32"),
    "no hash": lambda m: m["files"]["model.onnx"].update(sha256=None),
    "another type": lambda m: m["weights"].update(types={"F64": 3}),
    "another placement": lambda m: m["weights"].update(placement="sent"),
    "an engine without a hash": lambda m: m.update(engines={"tensorrt-1": {"bytes": 5}}),
    "another block": lambda m: m["weights"].update(quantization={"bits": 4, "block_size": 48}),
    "a ring without slots": lambda m: m["kv"]["layers"][0].update(capacity=0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_anything_else_is_not(name: str) -> None:
    manifest = copy.deepcopy(manifest_of(exported(chunk=4).bundle))
    assert complaints(manifest) == []
    CHANGES[name](manifest)
    assert complaints(manifest) != []
