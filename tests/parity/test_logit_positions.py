"""Logits only where somebody asked: the head multiplies as many rows as are wanted, and none when nobody wants any."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.bisect.local import ROUNDING
from exporter.bundle_graph import load_graph
from exporter.taps import Array, modules_of, open_session, with_outputs
from graph_passes.prove import difference
from runtime import Session
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from runtime.bundle import read_bundle
from runtime.chunking import Int64Array
from tests.support.bundles import Exported, exported
from tests.support.parity import Judge, largest_error, random_rows

CHUNK, BATCH = 5, 2
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, tied, bfloat16": {"tie": True, "dtype": "bfloat16"},
    "mixture of experts": {"architecture": "mixtral"},
    "by the front end transformers": {"frontend": "transformers"},
    "by the front end transformers, eager": {"frontend": "transformers", "attention": "eager"},
}


def case_of(name: str) -> Exported:
    return exported(chunk=CHUNK, **CASES[name])


def tapped(case: Exported, position_BR: Int64Array, *, native: bool) -> tuple[Array, dict[str, Array]]:
    """Logits of a first chunk, and what the final norm and the head gave out, by the graph in the bundle's file."""
    bundle = read_bundle(case.bundle)
    model = load_graph(bundle)
    names = {path: value for path, value in modules_of(model).items() if path in ("norm", "lm_head")}
    assert len(names) == 2
    session = open_session(with_outputs(model, names.values()), bundle.weights_folder, native=native, threads=1)
    sizes, kv = bundle.manifest.model, bundle.manifest.kv
    feeds: dict[str, Array] = {
        "input_ids": np.random.default_rng(0).integers(0, sizes.vocab_size, (BATCH, CHUNK)),
        "start_positions": np.zeros(BATCH, np.int64),
        "token_counts": np.array([CHUNK, CHUNK - 2]),
        "logit_positions": position_BR,
    }
    for argument in session.get_inputs():
        if argument.name not in feeds:
            feeds[argument.name] = np.zeros((BATCH, *argument.shape[1:]), kv.dtype)
    logits, *taps = session.run(["logits", *names.values()], feeds)
    return logits, dict(zip(names, taps, strict=True))


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "bodies"])
@pytest.mark.parametrize("name", CASES)
def test_norm_and_head_see_the_tokens_asked_for_and_no_other(name: str, native: bool) -> None:
    case = case_of(name)
    config = case.opened().config
    every_BTV, _ = tapped(case, np.tile(np.arange(CHUNK), (BATCH, 1)), native=native)
    choices: list[list[list[int]]] = [
        [[], []], [[CHUNK - 1], [2]], [[1, 1, 0], [2, 0, 1]], [[0, 1, 2, 3, 4], [2, 2, 1, 0, 0]]
    ]  # fmt: skip
    for asked in choices:
        position_BR = np.array(asked, np.int64)
        logits_BRV, taps = tapped(case, position_BR, native=native)
        rows = position_BR.size
        assert taps["lm_head"].size == rows * config.vocab_size
        assert taps["norm"].size == rows * config.hidden_size
        assert logits_BRV.shape == (*position_BR.shape, config.vocab_size)
        expected_BRV = np.take_along_axis(every_BTV, position_BR[:, :, None], axis=1)
        # The same sums in a product of other extents, for which a kernel may round otherwise.
        assert position_BR.size == 0 or difference(expected_BRV, logits_BRV) <= ROUNDING


class Recorder:
    """Stands before an engine and notes how many logits each step asks it for."""

    def __init__(self, session: Session) -> None:
        engine = session._engine
        assert isinstance(engine, OnnxRuntimeEngine)
        self._step = engine.step
        self.asked: list[tuple[int, int]] = []
        engine.step = self.step  # type: ignore[method-assign]

    def step(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
    ) -> NDArray[np.float32]:
        logits_BRV = self._step(input_ids, start_positions, token_counts, logit_positions)
        assert logits_BRV.shape[:2] == logit_positions.shape
        self.asked.append((input_ids.shape[1], logit_positions.shape[1]))
        return logits_BRV


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_computes_the_logits_of_its_last_token(name: str) -> None:
    """Three chunks and a bit: nothing, nothing, nothing, one. All within the budget of the truth."""
    case = case_of(name)
    judge, session = Judge(case), case.session()
    recorder = Recorder(session)
    rows = random_rows([3 * CHUNK + 2], judge.vocab_size, seed=1)
    logits_BV = session.forward_last(rows)
    assert recorder.asked == [(CHUNK, 0), (CHUNK, 0), (CHUNK, 0), (2, 1)]
    truth, allowed = judge.truth_and_budget(rows)
    assert largest_error([truth[0][-1:]], [logits_BV]) <= allowed.allowed
    recorder.asked.clear()
    session.reset()
    assert largest_error(truth, list(session.forward(rows))) <= allowed.allowed
    assert recorder.asked == [(CHUNK, CHUNK)] * 3 + [(2, 2)]


def test_rows_that_end_in_different_steps_are_each_asked_for_where_they_end() -> None:
    case = case_of("dense")
    judge, session = Judge(case), case.session()
    recorder = Recorder(session)
    rows = random_rows([2 * CHUNK, 3, 4 * CHUNK + 1], judge.vocab_size, seed=2)
    logits_BV = session.forward_last(rows)
    assert recorder.asked == [(CHUNK, 1), (CHUNK, 1), (CHUNK, 0), (CHUNK, 0), (1, 1)]
    truth, allowed = judge.truth_and_budget(rows)
    assert largest_error([logits[-1:] for logits in truth], [row[None] for row in logits_BV]) <= allowed.allowed


def test_generation_asks_for_one_token_a_row() -> None:
    case = case_of("dense")
    session = case.session()
    recorder = Recorder(session)
    made = session.generate_batch([[1, 2, 3, 4, 5, 6, 7], [8, 9]], max_new_tokens=4, stop_ids=())
    assert [len(row) for row in made] == [4, 4]
    assert recorder.asked == [(CHUNK, 1), (2, 1), (1, 1), (1, 1), (1, 1)]


def test_a_step_that_is_asked_for_nothing_rolls_the_rings_on() -> None:
    """Bit for bit as a step that computes everything."""
    case = case_of("dense")
    sessions = [case.session(), case.session()]
    tokens = random_rows([CHUNK], case.opened().config.vocab_size, seed=3)
    rings = []
    for session, wanted in zip(sessions, (0, CHUNK), strict=True):
        engine = session._engine
        assert isinstance(engine, OnnxRuntimeEngine)
        engine.step(np.array(tokens), np.array([0]), np.array([CHUNK]), np.arange(wanted)[None])
        rings.append([array.copy() for layer in engine.kv.layers for array in (layer.key_BGSD, layer.value_BGSD)])
    for idle, asked in zip(*rings, strict=True):
        assert np.array_equal(idle, asked)
        assert idle.any()
