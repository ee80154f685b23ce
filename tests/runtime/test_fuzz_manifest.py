"""Thousands of damaged bundles: each is read or refused by an error of our own (tests/support/fuzz.py)."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from runtime import read_bundle
from tests.support.fuzz import Target, assert_kept_the_rule, fuzz
from tests.support.mutate import Mutator, grafting, mutate_bytes, mutate_sizes
from tests.support.toy_bundle import ToyModel, write_manifest, write_toy_bundle

MODEL = ToyModel(windows=(4, None), context=20)


@pytest.fixture
def bundles(tmp_path: Path) -> list[Path]:
    """One that holds its weights, and one that refers to those of the other."""
    whole = write_toy_bundle(tmp_path / "whole", MODEL, {"tokenizer.json": "{}"})
    referring = write_toy_bundle(tmp_path / "referring", MODEL)
    (referring / "weights.bin").unlink()
    manifest = json.loads((referring / "manifest.json").read_text(encoding="utf-8"))
    manifest["weights"] |= {"placement": "folder", "folder": str(whole)}
    write_manifest(referring, manifest)
    return [whole, referring]


def read(folder: Path, random: Random) -> None:
    read_bundle(folder, verify=random.random() < 0.3)


def test_intact_ones_are_read(bundles: list[Path]) -> None:
    for folder in bundles:
        assert read_bundle(folder, verify=True).unverified == ()


def test_manifests(bundles: list[Path], tmp_path: Path) -> None:
    mutate = grafting([(folder / "manifest.json").read_bytes() for folder in bundles])
    mutators: list[Mutator] = [mutate, mutate, mutate, mutate_sizes]
    targets = [Target(folder, "manifest.json", mutator) for folder in bundles for mutator in mutators]
    outcome = fuzz(targets, read, tmp_path / "cases", first=7_000_000, count=1200)
    assert_kept_the_rule(outcome, accepted=100, BundleError=500)


def test_other_files(bundles: list[Path], tmp_path: Path) -> None:
    targets = [Target(bundles[0], name, mutate_bytes) for name in ("weights.bin", "model.onnx", "tokenizer.json")]
    outcome = fuzz(targets, read, tmp_path / "cases", first=8_000_000, count=200)
    assert_kept_the_rule(outcome, accepted=10, BundleError=50)
