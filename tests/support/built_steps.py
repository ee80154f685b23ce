"""Engines of graphs for ONNX Runtime on CUDA, built of tiny bundles."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.build.build import build
from exporter.build.step_engine import BuiltSteps
from runtime.bundle import Bundle, read_bundle
from tests.support.bundles import exported

BACKEND = "onnxruntime-cuda"
WINDOW, CHUNK, ROWS = 5, 4, 2
SIZES: Mapping[str, Any] = {"dtype": "bfloat16", "window": WINDOW, "num_layers": 2}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "window": SIZES,
    "no window": {**SIZES, "window": None, "context": 40},
    "mixtral": {**SIZES, "architecture": "mixtral"},
    "int4 mixtral": {
        **SIZES,
        "architecture": "mixtral",
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 64,
        "options": {"weights": "int4", "prove": False},
    },
}


def bundle_of(model: str, folder: Path) -> Bundle:
    """A bundle of MODELS in `folder`, its own to be written into."""
    shutil.copytree(exported(chunk=CHUNK, max_batch=ROWS, **MODELS[model]).bundle, folder)
    return read_bundle(folder)


def built(bundle: Bundle, **options: Any) -> BuiltSteps:
    """`build` for this backend."""
    made = build(bundle.path, backend=BACKEND, **options)
    assert isinstance(made, BuiltSteps)
    return made
