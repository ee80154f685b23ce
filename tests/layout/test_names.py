"""Our four top-level names are ordinary words: an installation must resolve each of them to this repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layout.imports import OURS, ROOT


def run_elsewhere(code: str, folder: Path) -> str:
    """Runs `code` in a fresh interpreter of this environment from another folder; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", OURS)
def test_each_name_resolves_to_this_repository(name: str, tmp_path: Path) -> None:
    found = run_elsewhere(f"import {name}; print({name}.__file__)", tmp_path).strip()
    assert Path(found).resolve() == ROOT / name / "__init__.py"


def test_importing_the_runtime_loads_nothing_that_only_an_export_needs(tmp_path: Path) -> None:
    loaded = json.loads(run_elsewhere("import runtime, json, sys; print(json.dumps(list(sys.modules)))", tmp_path))
    tops = {name.split(".")[0] for name in loaded}
    assert "runtime" in tops
    assert not tops & {"torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "transformers"}


def test_importing_the_exporter_does_not_load_the_optional_package(tmp_path: Path) -> None:
    """transformers is an extra: only an export that asks for its models needs it."""
    code = "import exporter.frontends.transformers_model as model, json, sys; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(run_elsewhere(code, tmp_path))
    assert "torch" in loaded
    assert "transformers" not in loaded
