"""Memory of the engine of ONNX Runtime on CUDA, on the CPU provider: constant, refused where short, given back."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from runtime import BackendError, BundleError, Session, SessionError
from runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaEngine
from runtime.bundle import read_bundle
from runtime.engine_weights import LOADING
from runtime.onnxruntime_cuda import rings
from runtime.onnxruntime_cuda.staging import Logits
from runtime.step_engine_info import StepEngineInfo
from tests.support.host_place import HostBlock, HostMemory, host_place
from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_steps import open_steps, step_files, write_step_engine

MODEL = ToyModel(windows=(4, None, 6), chunk=3, context=60, seed=3)
Made = tuple[Path, StepEngineInfo]


def tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(count).integers(0, MODEL.vocab_size, count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = write_toy_bundle(tmp_path_factory.mktemp("toy"), MODEL)
    return folder, write_step_engine(folder, MODEL)


def test_memory_does_not_grow(made: Made) -> None:
    opened = open_steps(*made)
    kv_bytes = opened.session.kv_bytes
    opened.session.forward(tokens(9))
    held = opened.memory.held
    for count in (30, 1, 1, 2, 3):
        opened.session.forward(tokens(count))
    assert opened.memory.held == held
    for _ in range(3):
        for batch in (3, 1):
            opened.session.reset()
            opened.session.forward([tokens(9)] * batch)
            opened.session.forward([[1]] * batch)
            assert opened.session.kv_bytes == batch * kv_bytes
    assert opened.memory.held == held


def test_the_old_rows_go_before_the_new_ones_come(made: Made) -> None:
    opened = open_steps(*made)
    opened.session.forward([tokens(3)] * 4)
    opened.memory.limit = opened.memory.held
    for batch in (3, 4, 2, 4):
        opened.session.reset()
        opened.session.forward([tokens(3)] * batch)


def test_rows_that_do_not_fit_are_refused_and_fewer_go_on(made: Made) -> None:
    opened, other = open_steps(*made), open_steps(*made)
    opened.session.forward(tokens(7))
    opened.memory.limit = opened.memory.held
    opened.session.reset()
    with pytest.raises(BackendError, match="the KV buffers of 4 rows"):
        opened.session.forward([tokens(7)] * 4)
    assert opened.session.kv_bytes == 0
    with pytest.raises(SessionError, match=r"reset\(\)"):
        opened.session.forward([1])
    none = np.zeros((1, 0), np.int64)
    step = (np.ones((1, 1), np.int64), none[0], none[0], none)
    with pytest.raises(SessionError, match="no KV buffers"):
        opened.engine.step(*step)
    with pytest.raises(SessionError, match="no KV buffers"):
        opened.engine.top.step(*step, 1)
    opened.session.reset()
    for feed in (tokens(7), [1]):
        assert np.array_equal(opened.session.forward(feed), other.session.forward(feed))


@pytest.mark.parametrize("windows", [(4,), (None,)], ids=["laid out straight", "as they are"])
def test_buffers_that_kernels_cannot_count_are_refused(
    tmp_path: Path, windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ToyModel(windows=windows, chunk=3, context=60)
    folder = write_toy_bundle(tmp_path, model)
    opened = open_steps(folder, write_step_engine(folder, model))
    longest = (60 + 3 if windows[0] is None else 256) * model.num_kv_heads * model.head_dim
    monkeypatch.setattr(rings, "MOST_NUMBERS", 3 * longest)
    opened.session.forward([[1]] * 3)
    opened.session.reset()
    with pytest.raises(BackendError, match=rf"hold {4 * longest} numbers for 4 rows.*count up to {3 * longest}\."):
        opened.session.forward([[1]] * 4)


def test_logits_that_kernels_cannot_count_are_refused() -> None:
    memory = HostMemory()
    logits = Logits(memory, batch=8, vocab_size=1 << 17)
    with pytest.raises(BackendError, match=r"logits of 2048 tokens of 8 rows would be 2147483648.*`forward_last`"):
        logits.address(2048)
    logits.free()
    assert memory.held == 0


SHORT = [
    "the weights", "the KV buffers of 1 rows", "the inputs", "the logits", "the highest logits", "laid out straight",
]  # fmt: skip


@pytest.mark.parametrize("words", SHORT)
def test_all_leaves_where_something_does_not_fit_even_while_the_error_is_kept(
    made: Made, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, memory, sessions = HostMemory.allocate, HostMemory(), []
    make = ort.InferenceSession

    def allocate(self: HostMemory, nbytes: int, what: str) -> HostBlock:
        if words in what and ("straight" in words or "straight" not in what):
            raise BackendError(f"too little memory for {what}")
        return real(self, nbytes, what)

    def made_session(*arguments: Any, **options: Any) -> Any:
        session = make(*arguments, **options)
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(HostMemory, "allocate", allocate)
    monkeypatch.setattr(ort, "InferenceSession", made_session)
    folder, info = made
    bundle = read_bundle(folder)
    with pytest.raises(BackendError, match="too little memory") as kept:
        OnnxRuntimeCudaEngine(bundle, info, step_files(folder, info), host_place(memory))
    gc.collect()
    assert memory.held == 0
    assert len(sessions) == 3
    assert not any(session() for session in sessions)
    assert words in str(kept.value)


def test_a_session_that_is_dropped_gives_all_back(made: Made) -> None:
    opened = open_steps(*made)
    memory = opened.memory
    opened.session.forward([tokens(9)] * 2)
    assert memory.held > 0
    del opened
    gc.collect()
    assert memory.held == 0


def test_rings_are_zeroed_and_nothing_else_of_them_is_read(made: Made) -> None:
    """Fresh memory is poisoned, and so is what was given back: a NaN in a ring would be one in the logits."""
    opened = open_steps(*made)
    for batch in (1, 2, 1):
        assert np.isfinite(opened.session.forward_last([tokens(5)] * batch)).all()
        opened.session.reset()
    zeroed = [nbytes for what, nbytes in opened.memory.asked if what.startswith("the KV buffers")]
    assert set(zeroed) <= set(opened.memory.zeroed)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_brought_once_and_reported(made: Made) -> None:
    folder, info = made
    reports: list[tuple[str, int, int]] = []
    memory, bundle = HostMemory(), read_bundle(folder)
    engine = OnnxRuntimeCudaEngine(
        bundle, info, step_files(folder, info), host_place(memory), progress=lambda *said: reports.append(said)
    )
    total = sum(weight.nbytes for weight in MODEL.weights.values())
    assert reports[-1] == (LOADING, total, total)
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)
    assert sum(memory.writes) == total
    Session(bundle, engine).forward([tokens(5)] * 3)
    assert len([what for what, _ in memory.asked if what.startswith("the weights")]) == 1


def test_a_weight_that_is_not_as_large_as_it_says(made: Made) -> None:
    folder, info = made
    first = info.tensors[0]
    for shape, words in (((*first.shape, 2), "takes"), (first.shape[:1], "has more")):
        memory = HostMemory()
        changed = replace(info, tensors=(*info.tensors, replace(first, name="surplus", shape=shape)))
        with pytest.raises(BundleError, match=words):
            OnnxRuntimeCudaEngine(read_bundle(folder), changed, step_files(folder, info), host_place(memory))
        assert memory.held == 0
