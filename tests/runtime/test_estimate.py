"""A session's memory, said beforehand: the arithmetic, and a process that is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from runtime.bundle import read_bundle
from runtime.estimate import OVERHEAD_BYTES, estimate
from runtime.kernels import kernels
from runtime.manifest import FileInfo, Manifest
from runtime.manifest_quantization import QuantizationInfo
from runtime.rolling_kv import kv_bytes
from tests.support.bundles import exported
from tests.support.toy_bundle import ToyModel, write_toy_bundle

P = 1000
"""Parameters of the made-up manifests below."""

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import re, sys
sys.path.insert(0, sys.argv[1])
from runtime import load
session = load(sys.argv[2], threads=1)
for _ in range(3):
    session.forward_last([[1, 2, 3] * session.manifest.kv.chunk])
print(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
"""


def manifest_with(folder: Path, files: int, **weights: Any) -> Manifest:
    """A toy's manifest with other weights."""
    manifest = read_bundle(write_toy_bundle(folder)).manifest
    by_name = MappingProxyType({"weights": FileInfo(files, None)})
    return replace(
        manifest,
        model=replace(manifest.model, parameters=P),
        weights=replace(manifest.weights, files=by_name, **weights),
    )


INT4 = QuantizationInfo(bits=4, block_size=32, zero_points=False, scales="float16", method="search", kept={})
BFLOAT16: dict[str, Any] = {"types": {"BF16": 9}, "folded_bytes": 4 * P, "folding_bytes": 4 * P}
BOTH: dict[str, Any] = {"types": {"BF16": 5, "F32": 4}, "folded_bytes": 2 * P, "folding_bytes": 2 * P}
EXPERTS: dict[str, Any] = {**BFLOAT16, "folding_bytes": 10 * P, "made_bytes": 1500, "making_bytes": 1500}
QUANTIZED: dict[str, Any] = {"types": {"U8": 9, "F16": 9, "BF16": 1}, "folded_bytes": 700, "folding_bytes": 700}
CASES: dict[str, tuple[int, dict[str, Any], bool, tuple[int, int, int]]] = {
    # bytes of files, weights of the manifest, kernels active: weights, folded, and what making them takes
    "float32, kernels": (4 * P + 50, {"types": {"F32": 9}}, True, (4 * P, 0, 0)),
    "float32, bodies": (4 * P + 50, {"types": {"F32": 9}}, False, (4 * P, 0, 0)),
    "bfloat16, kernels": (2 * P + 50, BFLOAT16, True, (2 * P, 0, 0)),
    "bfloat16, bodies": (2 * P + 50, BFLOAT16, False, (0, 4 * P, 4 * P)),
    "a checkpoint that holds more than the model": (9 * P, BFLOAT16, True, (2 * P, 0, 0)),
    "both types, bodies": (3 * P, BOTH, False, (2 * P, 2 * P, 2 * P)),
    "experts that are stacked, kernels": (2 * P, EXPERTS, True, (500, 1500, 1500)),
    "experts that are stacked, bodies": (2 * P, EXPERTS, False, (0, 4 * P, 10 * P)),
    "int4, kernels": (650, {**QUANTIZED, "quantization": INT4}, True, (650, 0, 0)),
    "int4, bodies": (650, {**QUANTIZED, "quantization": INT4}, False, (0, 700, 700)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_weights_are_read_where_they_lie_or_made(tmp_path: Path, name: str) -> None:
    files, weights, active, (mapped, folded, making) = CASES[name]
    found = estimate(manifest_with(tmp_path, files, **weights), kernels_active=active)
    assert (found.weights, found.folded) == (mapped, folded)
    assert found.loading == OVERHEAD_BYTES + int(1.2 * making)
    assert found.overhead == OVERHEAD_BYTES
    assert found.total == found.weights + found.folded + found.kv + found.buffers + found.overhead


def test_what_every_step_makes_anew_is_not_kept(tmp_path: Path) -> None:
    found = estimate(manifest_with(tmp_path, 2 * P, **BFLOAT16), kernels_active=False, folds=False)
    assert (found.weights, found.folded, found.loading) == (2 * P, 0, OVERHEAD_BYTES)


def test_rings_and_buffers_grow_with_the_rows(tmp_path: Path) -> None:
    model = ToyModel(windows=(4, None), context=30, chunk=3)
    manifest = read_bundle(write_toy_bundle(tmp_path, model)).manifest
    one, four = (estimate(manifest, batch=batch, kernels_active=True) for batch in (1, 4))
    assert four.kv == 4 * one.kv == kv_bytes([6, 30], batch=4, num_kv_heads=2, head_dim=3, dtype="float32")
    assert four.buffers == 4 * one.buffers
    assert (four.weights, four.folded, four.overhead) == (one.weights, one.folded, one.overhead)
    every = estimate(manifest, batch=4, kernels_active=True, all_logits=True)
    assert every.buffers - four.buffers == 4 * (3 - 1) * model.vocab_size * 4
    bodies = estimate(manifest, batch=4, kernels_active=False)
    assert bodies.buffers - four.buffers == 4 * 2 * model.num_heads * 3 * 30 * 4


@pytest.mark.parametrize("switch", ["", "off"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_takes_no_more_than_was_said_and_not_far_less(dtype: str, switch: str) -> None:
    """Of a model so small the overhead is nearly all, which is what this holds; benchmarks measure large ones."""
    bundle = exported(chunk=4, dtype=dtype).bundle
    command = [sys.executable, "-c", MEASURE, str(ROOT), str(bundle)]
    done = subprocess.run(
        command, env={**os.environ, "CIERZO_KERNELS": switch}, capture_output=True, text=True, check=True
    )
    active = switch != "off" and kernels() is not None
    said = estimate(read_bundle(bundle).manifest, kernels_active=active).total
    assert said / 2 < int(done.stdout) * 1024 <= said
