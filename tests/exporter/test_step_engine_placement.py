"""Engines of graphs on the real CUDA provider, with a stand-in for the GPU: where nodes run, what a step launches.

What the kernels would compute is seen elsewhere, on the CPU provider; here it is which of them run, and that a step
leaves the device alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.build.step_engine import BuiltSteps
from runtime.engine_info import DECODE, PREFILL
from runtime.step_engine_info import BOUNDS, CONSTANT, TOP
from tests.support.built_steps import CHUNK, MODELS, ROWS, built, bundle_of
from tests.support.cuda_stand_in import Event
from tests.support.onnxruntime_gpu import Observed, Step, place, run_steps

CASES = [
    (model, arithmetic)
    for model in MODELS
    for arithmetic in ("bfloat16", "float16")
    if not (model.startswith("int4") and arithmetic == "bfloat16")
]
RUNS = 4


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltSteps:
    model, arithmetic = request.param
    return built(bundle_of(model, tmp_path_factory.mktemp("engine") / "bundle"), arithmetic=arithmetic)


@pytest.fixture(scope="module")
def observed(engine: BuiltSteps) -> dict[str, Observed]:
    """Some steps of both graphs."""
    steps = {PREFILL: step(engine, PREFILL, runs=2), DECODE: step(engine, DECODE, runs=RUNS)}
    return dict(zip(steps, run_steps(list(steps.values())), strict=True))


def step(engine: BuiltSteps, kind: str, runs: int) -> Step:
    info = engine.info
    shares = {ring.present_key: ring.past_key for ring in info.rings}
    shares |= {ring.present_value: ring.past_value for ring in info.rings}
    for names in () if info.scratch is None or kind == DECODE else (info.scratch.keys, info.scratch.values):
        shares |= dict.fromkeys(names[1:], names[0])
    bounds = {BOUNDS: np.array([CHUNK, CHUNK], np.int32)} if info.scratch is not None and kind == PREFILL else {}
    return Step(
        engine.folder / info.graphs[kind].file,
        sizes={"B": ROWS, "T": CHUNK, "R": 1},
        values=bounds,
        on_host=list(bounds),
        shares=shares,
        constants=constants(engine),
        cuda_graph=kind == DECODE,
        runs=runs,
        optimized=False,
    )


def constants(engine: BuiltSteps) -> dict[str, np.ndarray[Any, Any]]:
    types = {"U8": np.uint8, "F16": np.float16}
    return {w.name: np.ones(w.shape, types[w.dtype]) for w in engine.info.tensors if w.role == CONSTANT}


def test_nodes_run_where_the_engine_says(engine: BuiltSteps, observed: dict[str, Observed]) -> None:
    for kind, found in observed.items():
        assert found.error is None
        assert found.assigned == engine.info.graphs[kind].placement


def test_decoding_is_captured_and_launched_as_one(observed: dict[str, Observed]) -> None:
    found = observed[DECODE]
    assert found.captured
    assert not found.violations
    assert [event.kind for event in found.running[-1]] == ["graph", "sync"]


def a_step(observed: dict[str, Observed], kind: str) -> tuple[Event, ...]:
    """What a step does once all is warm: mixtures of experts try out kernels in the first ones."""
    return observed[kind].running[-1] if kind == PREFILL else observed[kind].during_capture


@pytest.mark.parametrize("kind", [PREFILL, DECODE])
def test_nothing_is_copied_between_host_and_device(observed: dict[str, Observed], kind: str) -> None:
    copies = [event.what for event in a_step(observed, kind) if event.kind == "copy"]
    assert not [what for what in copies if not what.startswith("DtoD")]


@pytest.mark.parametrize("kind", [PREFILL, DECODE])
def test_attention_is_flash(engine: BuiltSteps, observed: dict[str, Observed], kind: str) -> None:
    launches = [event.what for event in a_step(observed, kind) if event.kind == "launch"]
    assert len([name for name in launches if "flash_fwd" in name]) == len(engine.info.rings)
    assert not [name for name in launches if "softmax_warp" in name or "fmha" in name or "Transpose" in name]


def test_the_graph_that_finds_the_highest_logits_runs_on_the_device(engine: BuiltSteps) -> None:
    top = engine.info.graphs[TOP]
    assert place(engine.folder / top.file, optimized=False).assigned == top.placement
