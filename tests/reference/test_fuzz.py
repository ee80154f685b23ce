"""Thousands of damaged checkpoints: each is read or refused by an error of our own (tests/support/fuzz.py).

What is accepted goes on to the weights' sources and to the plan of an export, which trust what a config says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from exporter.plan import make_plan
from reference.checkpoint import HUGGING_FACE, NATIVE, open_checkpoint, read_config
from reference.weight_maps import weight_map
from reference.weights import bind
from tests.support.checkpoints import make_checkpoint
from tests.support.fuzz import Target, assert_kept_the_rule, fuzz
from tests.support.mutate import Mutator, grafting, mutate_json, mutate_sizes
from tests.support.mutate_files import mutate_safetensors
from tests.support.native import as_native

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
SMALL = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "num_kv_heads": 1}

OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 1, "tie": True},
    "experts": {"architecture": "mixtral", "num_experts": 3, "num_layers": 1},
    "stacked": {"architecture": "mixtral", "num_experts": 3, "num_layers": 1, "expert_layout": "stacked"},
    "layers": {"architecture": "ministral", "layer_windows": [3, None], "rope": YARN, "eos_token_id": [2, 3]},
    "old": {"num_layers": 1, "generation": "old", "window": None, "rope": LLAMA3},
    "sharded": {"shards": 3},
}
NATIVE_TWINS = {"dense": 1, "experts": 1, "layers": 1, "sharded": 3}
"""Those of OPTIONS that are there in Mistral's own layout as well, with the number of shards."""

Checkpoints = dict[str, Path]
PUBLISHED = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Intact checkpoints by name, small enough to be copied thousands of times."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: make_checkpoint(root / name, **(SMALL | options)) for name, options in OPTIONS.items()}
    for name, shards in NATIVE_TWINS.items():
        made[f"native {name}"] = as_native(made[name], root / f"native {name}", shards=shards)
    return made


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder for each published config, with nothing else in it."""
    root = tmp_path_factory.mktemp("published")
    folders = []
    for kind, file_name in (("configs", "config.json"), ("params", "params.json")):
        for file in sorted((PUBLISHED / kind).glob("*.json")):
            folders.append(root / f"{kind} {file.stem}")
            folders[-1].mkdir()
            (folders[-1] / file_name).write_bytes(file.read_bytes())
    return folders


def targets(folders: Iterable[Path], pattern: str, mutate: Mutator = mutate_json) -> list[Target]:
    """The files of these folders that the pattern matches."""
    return [Target(folder, file.name, mutate) for folder in folders for file in sorted(folder.glob(pattern))]


def grafted(folders: Iterable[Path], pattern: str) -> list[Target]:
    """The same, damaged with each other's entries as well."""
    found = targets(folders, pattern)
    mutate = grafting([(target.folder / target.file).read_bytes() for target in found])
    return [replace(target, mutate=mutate) for target in found]


def read(folder: Path, random: Random) -> None:
    """What an export does with a checkpoint before it traces; now and then the files change under its hands."""
    checkpoint = open_checkpoint(folder)
    if random.random() < 0.05:
        for file in folder.glob("*.safetensors"):
            if random.random() < 0.5:
                os.truncate(file, random.choice((0, 100)))
            else:
                file.unlink()
    bind(checkpoint)
    make_plan(checkpoint.config)


def read_alone(folder: Path, random: Random) -> None:
    """A config without its weights: the model that it describes must still be one that can be spelled out."""
    file = next(folder.iterdir(), folder / "config.json")
    config = read_config(file)
    weight_map(config, frozenset(), NATIVE if file.name == "params.json" else HUGGING_FACE)
    make_plan(config)


def test_intact_ones_are_read(checkpoints: Checkpoints) -> None:
    for folder in checkpoints.values():
        checkpoint = open_checkpoint(folder)
        assert bind(checkpoint)
        assert make_plan(checkpoint.config)


def test_configs(checkpoints: Checkpoints, tmp_path: Path) -> None:
    found = grafted(checkpoints.values(), "config.json")
    assert len(found) == len(OPTIONS)
    outcome = fuzz(found, read, tmp_path, first=1_000_000, count=1200)
    assert_kept_the_rule(outcome, accepted=100, ConfigError=300, CheckpointError=30)


def test_params(checkpoints: Checkpoints, tmp_path: Path) -> None:
    found = grafted(checkpoints.values(), "params.json")
    assert len(found) == len(NATIVE_TWINS)
    outcome = fuzz(found, read, tmp_path, first=2_000_000, count=800)
    assert_kept_the_rule(outcome, accepted=80, ConfigError=200, CheckpointError=20)


def test_published_configs(published: list[Path], tmp_path: Path) -> None:
    found = grafted(published, "*.json")
    assert len(found) > 10
    outcome = fuzz(found, read_alone, tmp_path, first=3_000_000, count=1000)
    assert_kept_the_rule(outcome, accepted=60, ConfigError=300)


def test_giants_are_refused_at_once(checkpoints: Checkpoints, published: list[Path], tmp_path: Path) -> None:
    """A number of layers, experts or tokens that nobody could list decides nothing before it is refused."""
    outcome = fuzz(targets(published, "*.json", mutate_sizes), read_alone, tmp_path, first=4_000_000, count=500)
    assert_kept_the_rule(outcome, accepted=20, ConfigError=100)
    whole = targets(checkpoints.values(), "config.json", mutate_sizes)
    whole += targets(checkpoints.values(), "params.json", mutate_sizes)
    outcome = fuzz(whole, read, tmp_path, first=4_500_000, count=500)
    assert_kept_the_rule(outcome, accepted=50, ConfigError=50, CheckpointError=20)


def test_headers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folders = [checkpoints[name] for name in ("dense", "stacked", "sharded", "native sharded")]
    found = targets(folders, "*.safetensors", mutate_safetensors)
    assert len(found) == 1 + 1 + 3 + 3
    outcome = fuzz(found, read, tmp_path, first=5_000_000, count=1200)
    assert_kept_the_rule(outcome, accepted=50, CheckpointError=500)


def test_indices(checkpoints: Checkpoints, tmp_path: Path) -> None:
    found = targets(checkpoints.values(), "*.index.json")
    assert len(found) == 2
    outcome = fuzz(found, read, tmp_path, first=6_000_000, count=600)
    assert_kept_the_rule(outcome, accepted=20, CheckpointError=200)
