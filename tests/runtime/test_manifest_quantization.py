"""The manifest's section on quantised weights: read whole, and refused when it contradicts itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from runtime.errors import BundleError
from runtime.manifest import parse_manifest
from runtime.manifest_quantization import QuantizationInfo
from tests.support.toy_bundle import write_toy_bundle

QUANTIZATION: dict[str, Any] = {
    "bits": 4, "block_size": 32, "zero_points": False, "scales": "float16", "method": "search",
    "kept": {"embed": "BF16", "lm_head": "int8"},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_toy_bundle(tmp_path_factory.mktemp("toy"))
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


@pytest.fixture
def manifest(plain: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(plain)
    made["weights"].update(kind="int4", quantization=copy.deepcopy(QUANTIZATION))
    return made


def parsed(manifest: dict[str, Any]) -> QuantizationInfo | None:
    return parse_manifest(json.dumps(manifest).encode()).weights.quantization


def test_it_is_read(plain: dict[str, Any], manifest: dict[str, Any]) -> None:
    assert parsed(plain) is None
    assert parsed(manifest) == QuantizationInfo(4, 32, False, "float16", "search", {"embed": "BF16", "lm_head": "int8"})
    manifest["weights"].update(kind="stored")
    manifest["weights"]["quantization"].update(method="checkpoint")
    assert parsed(manifest) is not None


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no section": (lambda w: w.pop("quantization"), "quantization` must be an object, but it is missing"),
    "null": (lambda w: w.update(quantization=None), r"quantization` \(null\) does not go with .* 'int4'"),
    "other bits": (lambda w: w.update(kind="int8"), r"\(4 bits by search\) does not go with .* 'int8'"),
    "converted": (lambda w: w.update(kind="fp32"), "does not go with .* 'fp32'"),
    "stored": (lambda w: w.update(kind="stored"), "does not go with .* 'stored'"),
    "linked": (lambda w: w.update(placement="linked"), "does not go with .* 'linked'"),
    "three bits": (lambda w: w["quantization"].update(bits=3), "quantization.bits` is 3, .* only 8, 4"),
    "a block of 48": (lambda w: w["quantization"].update(block_size=48), "block_size` is 48"),
    "a number for a flag": (lambda w: w["quantization"].update(zero_points=1), "zero_points` must be true or false"),
    "no flag": (lambda w: w["quantization"].pop("zero_points"), "zero_points` must be .* but it is missing"),
    "other scales": (lambda w: w["quantization"].update(scales="F16"), "scales` is 'F16'"),
    "another method": (lambda w: w["quantization"].update(method="gptq"), "method` is 'gptq'"),
    "kept as nothing": (lambda w: w["quantization"]["kept"].update(embed="int2"), "kept.embed` is 'int2'"),
    "a list": (lambda w: w.update(quantization=[]), "quantization` must be an object"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_contradictions_are_refused(manifest: dict[str, Any], name: str) -> None:
    change, message = CHANGES[name]
    change(manifest["weights"])
    with pytest.raises(BundleError, match=message):
        parsed(manifest)
