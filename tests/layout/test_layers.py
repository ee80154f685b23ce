"""The packages know each other only as the table in tests/layout/imports.py says."""

from __future__ import annotations

import pytest

from tests.layout.imports import OURS, ROOT, imports, product_files, violations


def test_no_package_imports_what_it_may_not() -> None:
    found = [line for path in product_files() for line in violations(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_one_file_that_is_part_of_an_export_imports_the_package_of_the_second_front_end() -> None:
    importing = {
        path
        for path in product_files()
        for item in imports((ROOT / path).read_text(encoding="utf-8"), "")
        if item.module.split(".")[0] == "transformers"
    }
    assert importing == {"exporter/frontends/transformers_model.py", "exporter/demo_data/train.py"}


def test_the_check_sees_all_four_packages() -> None:
    assert {path.split("/")[0] for path in product_files()} == set(OURS)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/session.py", "import torch"),
        ("runtime/session.py", "import numpy, onnx_ir"),
        ("runtime/session.py", "def f():\n    from safetensors import safe_open"),
        ("runtime/backends/base.py", "from reference.config import ModelConfig"),
        ("runtime/session.py", "import importlib\nimportlib.import_module('torch.nn')"),
        ("runtime/session.py", "onnx = __import__('onnx')"),
        ("reference/model.py", "from graph_passes import pipeline"),
        ("reference/model.py", "from runtime.session import Session"),
        ("reference/model.py", "from runtime import load"),
        ("reference/model.py", "if TYPE_CHECKING:\n    import onnx"),
        ("graph_passes/fuse/rope.py", "import torch"),
        ("graph_passes/fuse/rope.py", "import reference"),
        ("graph_passes/fuse/rope.py", "from ..ops import x\nfrom exporter import plan"),
        ("exporter/trace.py", "from transformers import AutoModel"),
        ("runtime/session.py", "def f():\n    import cryptography"),
        ("reference/model.py", "from tests.support import x"),
    ],
)
def test_the_check_finds(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/model.py", "import math\nimport torch.nn.functional as F\nfrom reference.norm import RMSNorm"),
        ("reference/model.py", "from runtime.errors import ConfigError"),
        ("reference/checkpoint.py", "from runtime.json_files import read_json_object"),
        ("graph_passes/driver.py", "from runtime import errors\nimport onnx_ir as ir"),
        ("graph_passes/fuse/rope.py", "from . import gqa\nfrom .gqa import x\nfrom ..ops.moe import y"),
        ("runtime/backends/base.py", "def f():\n    import onnxruntime"),
        ("exporter/export.py", "import runtime, reference.model, graph_passes.pipeline, click"),
        ("exporter/demo_data/train.py", "import transformers"),
        ("exporter/frontends/transformers_model.py", "def f():\n    import transformers"),
    ],
)
def test_the_check_lets_pass(path: str, source: str) -> None:
    assert violations(path, source) == []
