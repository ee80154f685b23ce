"""The engine on the real CUDA provider, on a stand-in for a GPU: what each step copies, launches and allocates.

Numbers mean nothing there (tests/support/cuda_stand_in); those are in test_onnxruntime_cuda_session.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.cuda_stand_in import Event
from tests.support.onnxruntime_gpu import Ran, run_python
from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_steps import write_step_engine

MODEL = ToyModel(windows=(4, None), chunk=3, context=60, vocab_size=60)

FEEDS = """
import gc
from runtime import load

mark("load")
session = load(job, backend="onnxruntime-cuda")
for name, feed in [
    ("many", [1, 2, 3]), ("many again", [1, 2, 3]), ("one", [1]), ("one again", [2]), ("one more", [3]),
]:
    mark(name)
    session.forward_last(feed)
for name in ("first top", "top"):
    mark(name)
    session.forward_candidates([4], 5, lambda values: True)
mark("reset")
session.reset()
mark("after a reset")
session.forward_last([1])
for batch in (2, 1):
    mark("reset again")
    session.reset()
    mark(f"{batch} rows")
    session.forward_last([[1]] * batch)
    mark(f"{batch} rows again")
    session.forward_last([[2]] * batch)
mark("gone")
answer = [session.kv_bytes, list(session.notes)]
del session
gc.collect()
mark("end")
"""


@pytest.fixture(scope="module", params=[(), ("lm_head", "0.q")], ids=["inputs", "constants"])
def ran(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Ran:
    folder = write_toy_bundle(tmp_path_factory.mktemp("toy"), MODEL)
    write_step_engine(folder, MODEL, constants=request.param)
    return run_python(FEEDS, str(folder))


def kinds(events: Sequence[Event]) -> list[str]:
    """What happened, without what the host waited for."""
    return [f"{e.kind} {e.what}" if e.kind in ("copy", "graph") else e.kind for e in events if e.kind != "sync"]


def copies(events: Sequence[Event]) -> list[tuple[str, int]]:
    return [(e.what, e.bytes) for e in events if e.kind == "copy"]


def test_it_runs_and_says_nothing(ran: Ran) -> None:
    assert ran.output == ""
    assert not [event for event in ran.events if event.kind == "violation"]
    width = MODEL.num_kv_heads * MODEL.head_dim
    assert ran.answer == [2 * 4 * width * (4 + 60 + 3), []]


IN, OUT = ("HtoD", 2 * 256 + 8), ("DtoH", 4 * MODEL.vocab_size)


def test_a_step_of_one_token_is_launched_as_a_whole(ran: Ran) -> None:
    for name in ("one again", "one more", "after a reset"):
        assert kinds(ran.after(name)) == ["copy HtoD", "graph launch", "copy DtoH"], name
        assert copies(ran.after(name)) == [IN, OUT]


def test_it_is_captured_once_for_each_number_of_rows(ran: Ran) -> None:
    for name in ("one", "2 rows", "1 rows"):
        found = Counter(kinds(ran.after(name)))
        assert found["graph launch"] == 1
        assert found["capture"] == 2, "its begin and its end"
    for name in ("2 rows again", "1 rows again"):
        assert kinds(ran.after(name)) == ["copy HtoD", "graph launch", "copy DtoH"]
    searched = 1
    assert sum(e.kind == "capture" and e.what == "end" for e in ran.events) == 3 + searched


def test_the_highest_logits_come_by_one_copy(ran: Ran) -> None:
    found = kinds(ran.after("top"))
    assert found == ["copy HtoD", "graph launch", "graph launch", "copy DtoH"]
    assert copies(ran.after("top")) == [IN, ("DtoH", 256 + 8 * MODEL.vocab_size)]


def test_no_step_allocates_once_it_has_run(ran: Ran) -> None:
    for name in ("many again", "one again", "one more", "top", "reset", "after a reset"):
        assert not [e for e in ran.after(name) if e.kind in ("allocate", "free")], name


def test_a_step_of_many_tokens_brings_only_what_is_asked_for(ran: Ran) -> None:
    back = [nbytes for what, nbytes in copies(ran.after("many again")) if what == "DtoH"]
    assert back == [4 * MODEL.vocab_size]
    rings = 4 * 2 * (60 + 3) * MODEL.num_kv_heads * MODEL.head_dim
    assert max(e.bytes for e in ran.after("many again") if e.kind == "copy") < rings


def test_weights_are_brought_once(ran: Ran) -> None:
    weights = sorted(weight.nbytes for weight in MODEL.weights.values())
    brought = [nbytes for what, nbytes in copies(ran.after("load")) if what.startswith("HtoD") and nbytes in weights]
    # A constant is brought by each of the two sessions that read it.
    assert sorted(set(brought)) == sorted(set(weights))
    assert sum(weights) <= sum(brought) <= 2 * sum(weights)
    later = [nbytes for what, nbytes in copies(ran.after("many")) if what.startswith("HtoD")]
    assert sum(later) < sum(weights) / 4


def test_a_session_that_is_dropped_gives_all_back(ran: Ran) -> None:
    assert {event.kind for event in ran.after("gone")} <= {"free", "sync"}
    assert sum(event.kind == "free" for event in ran.after("gone")) >= 7


SHORT = """
from runtime import CierzoError, load
from runtime.onnxruntime_cuda.provider import open_cuda

memory = open_cuda().memory
answer, held = [], []
def fill(left):
    import ctypes
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    memory._runtime.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    held.append(memory.allocate(free.value - left, "what is in the way"))
try:
    fill(4096)
    load(job, backend="onnxruntime-cuda")
except CierzoError as error:
    answer.append(str(error))
held.clear()
session = load(job, backend="onnxruntime-cuda")
fill(0)
try:
    session.forward_last([1, 2, 3])
except CierzoError as error:
    answer.append(str(error))
held.clear()
session.reset()
session.forward_last([1, 2, 3])
"""


def test_memory_that_does_not_suffice_is_said(tmp_path: Path) -> None:
    folder = write_toy_bundle(tmp_path, MODEL)
    write_step_engine(folder, MODEL)
    ran = run_python(SHORT, str(folder))
    loading, running = ran.answer
    assert "memory" in loading
    assert "does not suffice" in loading
    assert "the memory of the device does not suffice for the intermediate values of a step" in running
    assert ran.output == ""
