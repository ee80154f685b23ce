"""Damaged quantised checkpoints: each is read, numbers and all, or refused by an error of our own."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from reference.checkpoint import open_checkpoint
from reference.weights import PackedSource, bind, read_packed
from tests.support.fuzz import Target, assert_kept_the_rule, fuzz
from tests.support.mutate import grafting, mutate_sizes
from tests.support.mutate_files import mutate_safetensors
from tests.support.quantized_checkpoints import Kind, make_quantized

SMALL: dict[str, Any] = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}
KINDS = {
    "gptq": Kind("gptq", group=16),
    "symmetric": Kind("gptq", bits=8, symmetric=True, group=-1),
    "awq": Kind("awq"),
    "packed": Kind("pack-quantized", index="stored"),
    "integers": Kind("int-quantized", bits=8, scales="bfloat16"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Intact quantised checkpoints."""
    root = tmp_path_factory.mktemp("quantised")
    made = [make_quantized(root / name, kind, **SMALL).packed for name, kind in KINDS.items()]
    experts: dict[str, Any] = {"architecture": "mixtral", "num_experts": 2}
    return [*made, make_quantized(root / "experts", KINDS["packed"], **(SMALL | experts)).packed]


def read(folder: Path, random: Random) -> None:
    """What an export reads: every packed matrix, a slice of which may be any rows."""
    checkpoint = open_checkpoint(folder)
    for source in bind(checkpoint).values():
        if isinstance(source, PackedSource):
            first, last = sorted(random.choices(range(source.shape[-2] + 1), k=2))
            for expert in range(len(source.pieces)):
                read_packed(checkpoint, source, expert, first, last)


def test_configs(folders: list[Path], tmp_path: Path) -> None:
    configs = [(folder / "config.json").read_bytes() for folder in folders]
    found = [
        Target(folder, "config.json", mutate) for folder in folders for mutate in (grafting(configs), mutate_sizes)
    ]
    outcome = fuzz(found, read, tmp_path, first=7_000_000, count=700)
    assert_kept_the_rule(outcome, accepted=50, ConfigError=170, CheckpointError=20)


def test_headers(folders: list[Path], tmp_path: Path) -> None:
    found = [Target(folder, "model.safetensors", mutate_safetensors) for folder in folders]
    outcome = fuzz(found, read, tmp_path, first=8_000_000, count=400)
    assert_kept_the_rule(outcome, accepted=10, CheckpointError=150)
