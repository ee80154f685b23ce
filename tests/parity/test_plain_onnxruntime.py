"""The exported file stands alone: standard tools check it and run it, without any Cierzo code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from exporter.write import MODEL_FILE
from reference.checkpoint import SINGLE_FILE
from tests.support.bundles import exported
from tests.support.parity import Judge, largest_error, random_rows

PROGRAM = Path(__file__).with_name("plain_onnxruntime.py")
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, bfloat16": {"dtype": "bfloat16"},
    "mixture of experts": {"architecture": "mixtral"},
    "mixture of experts, float16": {"architecture": "mixtral", "dtype": "float16"},
}


@pytest.mark.parametrize("name", CASES)
def test_plain_onnxruntime_computes_the_logits(name: str, tmp_path: Path) -> None:
    case = exported(chunk=4, **CASES[name])
    for file in (MODEL_FILE, SINGLE_FILE):  # these two, and no manifest; links are files like all others
        (tmp_path / file).hardlink_to(case.bundle / file)
    judge = Judge(case)
    rows = random_rows([23, 23], judge.vocab_size, seed=1)
    np.save(tmp_path / "tokens.npy", np.array(rows))
    command = [sys.executable, "-I", str(PROGRAM), MODEL_FILE, "4", "tokens.npy", "logits.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    truth, allowed = judge.truth_and_budget(rows)
    assert largest_error(truth, list(np.load(tmp_path / "logits.npy"))) <= allowed.allowed


def test_the_example_of_the_bundle_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/bundle.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    case = exported(chunk=4)
    monkeypatch.chdir(case.bundle)
    prompt = random_rows([11], case.opened().config.vocab_size, seed=3)[0]
    names: dict[str, Any] = {"onnxruntime": onnxruntime, "np": np, "prompt": prompt, "chunk": 4}
    exec(example, names)
    assert names["logits"].shape == (1, 1, case.opened().config.vocab_size)
    truth, allowed = Judge(case).truth_and_budget([prompt])
    assert largest_error([truth[0][-1:]], [names["logits"][0]]) <= allowed.allowed
    assert names["next_id"] == case.session().forward_last([prompt])[0].argmax()


def test_the_program_really_is_without_cierzo(tmp_path: Path) -> None:
    text = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import plain_onnxruntime as p; "
    text += "sys.meta_path.insert(0, p.Refuser()); import runtime"
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ImportError: runtime is not there" in done.stderr


@pytest.mark.parametrize("name", CASES)
def test_the_checker_accepts_the_file_in_full(name: str, tmp_path: Path) -> None:
    case = exported(chunk=4, **CASES[name])
    for file in (MODEL_FILE, SINGLE_FILE):  # copied, since the checker takes every hard link for an attack
        shutil.copyfile(case.bundle / file, tmp_path / file)
    onnx.checker.check_model(str(tmp_path / MODEL_FILE), full_check=True)


@pytest.mark.parametrize("name", CASES)
def test_all_weights_lie_outside_of_the_file(name: str) -> None:
    case = exported(chunk=4, **CASES[name])
    proto = onnx.load(case.bundle / MODEL_FILE, load_external_data=False)
    outside = {t.name for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    inside = [t for t in proto.graph.initializer if t.name not in outside]
    assert len(outside) == sum(".weight" in t.name or "_proj" in t.name for t in proto.graph.initializer)
    assert sum(len(t.raw_data) for t in inside) < 512
    places = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert places == {SINGLE_FILE}
    assert (case.bundle / MODEL_FILE).stat().st_size < 64 * 1024
