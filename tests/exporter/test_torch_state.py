"""What a caller has set in torch reaches neither the bundle nor the truth, and is there again afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import export
from reference.checkpoint import open_checkpoint
from reference.oracle import Oracle
from tests.support.bundles import checkpoint


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device() == torch.device(device)
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield
        assert torch.is_inference_mode_enabled()


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield
        assert torch.is_autocast_enabled("cpu")


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield
        assert torch.is_grad_enabled()


SHAPE: dict[str, Any] = {"architecture": "mixtral", "num_layers": 1}
STATES = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta device by default": lambda: default_device("meta"),
    "inference mode": inference_mode,
    "autocast": autocast,
    "gradients": gradients,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that is exported with torch as it was imported."""
    return export(checkpoint(**SHAPE), tmp_path_factory.mktemp("plain") / "bundle", prove=False)


@pytest.mark.parametrize("name", STATES)
def test_the_callers_torch_state_changes_nothing(tmp_path: Path, plain: Path, name: str) -> None:
    folder = checkpoint(**SHAPE)
    (expected,) = Oracle(open_checkpoint(folder)).logits([[1, 5, 3]], torch.float32)
    with STATES[name]():
        bundle = export(folder, tmp_path / "bundle", prove=False)
        (logits,) = Oracle(open_checkpoint(folder)).logits([[1, 5, 3]], torch.float32)
    assert contents(bundle) == contents(plain)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert not logits.requires_grad


def test_threads_may_export_at_once(tmp_path: Path, plain: Path) -> None:
    folder = checkpoint(**SHAPE)
    with ThreadPoolExecutor(2) as pool:
        bundles = list(pool.map(lambda name: export(folder, tmp_path / name, prove=False), ("one", "two")))
    assert [contents(bundle) for bundle in bundles] == [contents(plain)] * 2
