"""An engine of a model of 1.0 B parameters, built without its weights: how large it is, in what memory, and what fused.

The checkpoint is a header in front of a hole, so that nothing but the build takes time.
"""

from __future__ import annotations

import pytest

from benchmarks.engine_build import LARGEST_PEAK, LARGEST_PLAN, ONE_BILLION
from benchmarks.sparse_checkpoints import shape_of, write_sparse
from exporter import export
from exporter.build.plan_engine import BuiltEngine
from runtime.engine_info import DECODE, PREFILL
from tests.support.engines import built_plans

LAYERS = ONE_BILLION["num_hidden_layers"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltEngine:
    folder = tmp_path_factory.mktemp("one billion")
    checkpoint = write_sparse(folder / "checkpoint", ONE_BILLION, shard_bytes=None)
    assert shape_of(ONE_BILLION).stored_bytes > 2e9
    bundle = export(checkpoint, folder / "bundle", hashes=False, prove=False)
    return built_plans(bundle, compute_capability="8.9")


def test_plans_without_weights_are_small_and_built_in_little_memory(built: BuiltEngine) -> None:
    assert {name: plan.bytes < LARGEST_PLAN for name, plan in built.info.plans.items()} == {PREFILL: True, DECODE: True}
    assert built.peak_bytes < LARGEST_PEAK


@pytest.mark.parametrize("plan", [PREFILL, DECODE])
def test_what_fused(built: BuiltEngine, plan: str) -> None:
    """QKV, output, gate and up, and down: four products a layer, and the head; the rest is two norms and one gate."""
    for counts in built.kernels[plan]:
        assert counts["product"] == 4 * LAYERS + 1
        assert (counts["plugin"], counts["attention"]) == (LAYERS, 0)
        assert counts["copy"] <= 1  # the logits' cast
        assert counts["other"] <= 3 * LAYERS + 2
