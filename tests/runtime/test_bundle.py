"""What makes a folder a bundle, and each way in which it may fail to be one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import BundleError, read_bundle
from tests.support.toy_bundle import ToyModel, write_manifest, write_toy_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle", ToyModel(windows=(4, None), context=20))


def damage(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder, manifest)


def test_a_good_bundle_is_read(folder: Path) -> None:
    bundle = read_bundle(folder, verify=True)
    assert bundle.manifest.model.num_layers == 2
    assert [layer.window for layer in bundle.manifest.kv.layers] == [4, None]
    assert [layer.capacity for layer in bundle.manifest.kv.layers] == [6, 20]
    assert bundle.manifest.model.eos_token_ids == (2,)
    assert bundle.file("model.onnx").is_file()


def test_unknown_keys_are_ignored(folder: Path) -> None:
    damage(folder, lambda manifest: manifest["model"].update(invented_later=1))
    assert read_bundle(folder).manifest.schema_version == 3


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        read_bundle(tmp_path / "nowhere")


def test_a_killed_export_is_no_bundle(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        read_bundle(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "[" * 100_000])
def test_a_manifest_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="JSON"):
        read_bundle(folder)


def test_a_manifest_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleError, match="is not readable JSON"):
        read_bundle(folder)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    with pytest.raises(BundleError, match=r"lacks the file weights\.bin"):
        read_bundle(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    weights = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(weights[:-1])
    with pytest.raises(BundleError, match=rf"has {len(weights) - 1} bytes, but its manifest says {len(weights)}"):
        read_bundle(folder)


def test_changed_content_is_found_when_asked(folder: Path) -> None:
    weights = bytearray((folder / "weights.bin").read_bytes())
    weights[7] ^= 1
    (folder / "weights.bin").write_bytes(weights)
    read_bundle(folder)
    with pytest.raises(BundleError, match=r"weights\.bin .* has the SHA-256"):
        read_bundle(folder, verify=True)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer schema": (lambda m: m.update(schema_version=4), "schema 4, but this Cierzo reads schema 3. Upgrade Cierzo"),
    "older schema": (lambda m: m.update(schema_version=2), "schema 2, whose graphs have other inputs"),
    "no schema": (lambda m: m.pop("schema_version"), "`schema_version` must be an integer, but it is missing"),
    "boolean size": (lambda m: m["model"].update(hidden_size=True), "`model.hidden_size` must be an integer"),
    "size as text": (lambda m: m["kv"].update(chunk="3"), "`kv.chunk` must be an integer, but it is '3'"),
    "no chunk": (lambda m: m["kv"].update(chunk=0), "`kv.chunk` is 0"),
    "no section": (lambda m: m.pop("graph"), "`graph` must be an object, but it is missing"),
    "graph name": (lambda m: m["graph"].update(logits=None), "`graph.logits` must be a string"),
    "kv dtype": (lambda m: m["kv"].update(dtype="float8"), "`kv.dtype` is 'float8', but this Cierzo knows only"),
    "kind": (lambda m: m["weights"].update(kind="fp8"), "`weights.kind` is 'fp8', but this Cierzo knows only"),
    "placement": (lambda m: m["weights"].update(placement="sent"), "`weights.placement` is 'sent'"),
    "types": (lambda m: m["weights"].update(types={"BF16": 0}), "`weights.types.BF16` is 0"),
    "folded": (lambda m: m["weights"].pop("folded_bytes"), "`weights.folded_bytes` must be an integer"),
    "folding": (lambda m: m["weights"].update(folding_bytes=2**60), "`weights.folding_bytes` is 1152921504606846976"),
    "no folder": (lambda m: m["weights"].update(placement="folder"), "`weights.folder` is None, which does not go"),
    "a folder": (lambda m: m["weights"].update(folder="/w"), "`weights.folder` is '/w', which does not go with"),
    "limit": (lambda m: m["kv"].update(position_limit=0), "`kv.position_limit` is 0"),
    "hash": (
        lambda m: m["weights"]["files"]["weights.bin"].update(sha256="ABC"),
        "`weights.files.weights.bin.sha256` must be 64 hexadecimal digits",
    ),
    "block hash": (
        lambda m: m["weights"]["files"]["weights.bin"].update(blocks_sha256=7),
        "`weights.files.weights.bin.blocks_sha256` must be a string",
    ),
    "layers": (lambda m: m["kv"]["layers"].pop(), "1 KV layers for a model of 2 layers"),
    "layer": (lambda m: m["kv"]["layers"].__setitem__(0, 5), "`kv.layers[0]` must be an object"),
    "small ring": (lambda m: m["kv"]["layers"][0].update(capacity=5), "has 5 slots, but a window of 4"),
    "full layer": (lambda m: m["kv"]["layers"][1].update(capacity=19), "must have `kv.context` = 20 slots"),
    "no context": (lambda m: m["kv"].update(context=None), "must have `kv.context` = None slots"),
    "chunk": (
        lambda m: (m["kv"].update(context=2), m["kv"]["layers"][1].update(capacity=2)),
        "larger than its context",
    ),
    "eos": (lambda m: m["model"].update(eos_token_ids=[99]), "inside the vocabulary"),
    "bos": (lambda m: m["model"].update(bos_token_id=37), "`model.bos_token_id` 37 is outside the vocabulary"),
    "unlisted file": (lambda m: m["files"].pop("model.onnx"), "refers to 'model.onnx', but does not list"),
    "tokenizer": (lambda m: m.update(tokenizer=[1]), "`tokenizer` must hold strings only"),
    "outside": (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "lies outside the bundle"),
    "weights outside": (
        lambda m: m["weights"]["files"].update({"../x": {"bytes": 1, "sha256": None, "blocks_sha256": None}}),
        "'../x', which lies outside the bundle",
    ),
    "absolute": (lambda m: m["files"].update({"/x": {"bytes": 1, "sha256": "0" * 64}}), "lies outside the bundle"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_manifest_is_refused(folder: Path, name: str) -> None:
    change, message = DAMAGES[name]
    damage(folder, change)
    with pytest.raises(BundleError, match=re.escape(message)):
        read_bundle(folder)


def test_engines_are_listed_and_opened_by_nobody(folder: Path) -> None:
    assert read_bundle(folder).manifest.engines == {}
    entry = {"bytes": 5, "sha256": "ab" * 32}
    damage(folder, lambda manifest: manifest.update(engines={"tensorrt-1": entry}))
    engines = read_bundle(folder, verify=True).manifest.engines
    assert {name: (info.bytes, info.sha256) for name, info in engines.items()} == {"tensorrt-1": (5, "ab" * 32)}


@pytest.mark.parametrize(
    "engines", [[], {"a": {"bytes": 5}}, {"a/b": None}, {"..": {"bytes": 5, "sha256": "ab" * 32}}, {"a": 3}, None]
)
def test_engines_that_are_none_are_refused(folder: Path, engines: Any) -> None:
    damage(folder, lambda manifest: manifest.update(engines=engines))
    with pytest.raises(BundleError, match="engine"):
        read_bundle(folder)
