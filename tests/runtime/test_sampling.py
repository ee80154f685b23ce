"""Sampling: each filter against transformers' own, the draws against their probabilities, and the refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime import InputError, SamplingOptions, SessionError
from runtime.sampling import Sampler, filter_scores, penalise_repetition, softmax

V = 50


def scores(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, 3, V)


def transformers_probabilities(
    scores_V: NDArray[np.float64], seen: list[int], options: SamplingOptions
) -> NDArray[np.float64]:
    """What transformers would draw from, with its processors in the order of its `generate`."""
    processors: list[LogitsProcessor] = []
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        processors.append(MinPLogitsWarper(options.min_p))
    processed = LogitsProcessorList(processors)(torch.tensor([seen]), torch.tensor(scores_V)[None])
    return np.asarray(torch.softmax(processed, dim=-1)[0].numpy())


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": V + 5},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 1.7, "top_k": 5, "top_p": 0.6, "min_p": 0.3, "repetition_penalty": 0.9},
]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_filters_equal_transformers(fields: dict[str, Any], seed: int) -> None:
    options = SamplingOptions(**{"temperature": 1.0, **fields})
    seen = [3, 5, 5, 3, 41, 49]
    seen_V = np.isin(np.arange(V), seen)
    scores_V = scores(seed)
    ours = softmax(filter_scores(penalise_repetition(scores_V, seen_V, options.repetition_penalty), options))
    theirs = transformers_probabilities(scores_V, seen, options)
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_the_order_of_the_filters_matters_and_is_top_k_before_top_p() -> None:
    scores_V = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    kept = filter_scores(scores_V, SamplingOptions(temperature=1.0, top_k=2, top_p=0.5))
    # After top-k the likeliest has 0.4 / 0.7 > 0.5 and is enough alone; before, 0.4 would not have been.
    assert np.isfinite(kept).tolist() == [True, False, False, False]


@pytest.mark.parametrize("p", [1e-20, 1e-6, 0.1, 0.5, 0.9, 0.99, 1 - 1e-9])
def test_top_p_sorts_only_some_and_keeps_what_sorting_all_would(p: float) -> None:
    rng = np.random.default_rng(5)
    for spread in (0.0, 1e-16, 0.01, 1.0, 30.0, 2000.0):
        for size in (1, 2, 7, 500):
            scores_V = (rng.normal(0, spread, size) if spread != 1.0 else rng.integers(-3, 3, size)).astype(np.float64)
            order = sorted(range(size), key=lambda token: (-scores_V[token], token))
            mass = 0.0
            wanted: list[int] = []
            for token in order:
                if mass < p or not wanted:
                    wanted.append(token)
                mass += softmax(scores_V)[token]
            kept = filter_scores(scores_V, SamplingOptions(temperature=1.0, top_p=p))
            assert set(np.flatnonzero(kept > -np.inf)) == set(wanted), (spread, size)


def test_top_k_keeps_ties_and_top_p_keeps_the_lower_ids_of_ties() -> None:
    scores_V = np.array([1.0, 2.0, 2.0, 2.0])
    assert (
        np.isfinite(filter_scores(scores_V, SamplingOptions(temperature=1.0, top_k=1))).tolist() == [False] + [True] * 3
    )
    kept = filter_scores(scores_V, SamplingOptions(temperature=1.0, top_p=0.4))
    assert np.isfinite(kept).tolist() == [False, True, True, False]


def nothing_seen() -> NDArray[np.bool_]:
    return np.zeros(V, dtype=bool)


def test_greedy_takes_the_lower_id_of_a_tie() -> None:
    logits_V = np.zeros(V, dtype=np.float32)
    logits_V[[30, 12, 44]] = 5
    assert Sampler(SamplingOptions()).choose(logits_V, nothing_seen()) == 12


def test_greedy_obeys_the_penalty() -> None:
    logits_V = np.zeros(V, dtype=np.float32)
    logits_V[[7, 9]] = [5, 4]
    seen_V = nothing_seen()
    seen_V[7] = True
    assert Sampler(SamplingOptions(repetition_penalty=2.0)).choose(logits_V, seen_V) == 9
    assert Sampler(SamplingOptions(repetition_penalty=1.2)).choose(logits_V, seen_V) == 7


def test_draws_follow_the_probabilities() -> None:
    options = SamplingOptions(temperature=0.8, top_k=6, seed=11)
    scores_V = scores(1)
    sampler = Sampler(options)
    count = 20_000
    drawn = np.bincount([sampler.choose(scores_V, nothing_seen()) for _ in range(count)], minlength=V)
    expected = softmax(filter_scores(scores_V, options)) * count
    assert not drawn[expected == 0].any()
    kept = expected > 0
    chi_square = (((drawn - expected) ** 2)[kept] / expected[kept]).sum()
    assert chi_square < 20.5  # the 0.1 % quantile for 5 degrees of freedom; the seed makes the outcome fixed


def test_seeds_repeat_and_rows_differ() -> None:
    def stream(seed: int, row: int = 0) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=2.0, seed=seed), row=row)
        return [sampler.choose(scores(2), nothing_seen()) for _ in range(30)]

    assert stream(4) == stream(4)
    assert stream(4) != stream(5)
    assert stream(4, row=1) == stream(5)


def test_a_certain_token_is_always_drawn() -> None:
    logits_V = np.full(V, -np.inf)
    logits_V[[0, V - 1]] = [-1e5, 0]
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0))
    assert {sampler.choose(logits_V, nothing_seen()) for _ in range(100)} == {V - 1}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value: float, temperature: float) -> None:
    logits_V = np.zeros(V, dtype=np.float32)
    logits_V[3] = value
    with pytest.raises(SessionError, match="not finite"):
        Sampler(SamplingOptions(temperature=temperature)).choose(logits_V, nothing_seen())


BAD_OPTIONS: list[tuple[str, Any]] = [
    ("max_new_tokens", 0),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", True),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("top_k", 0),
    ("top_k", 2.0),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("repetition_penalty", float("inf")),
    ("seed", -1),
    ("stop_ids", [-1]),
    ("stop_ids", [1.0]),
    ("stop_ids", "2"),
    ("stop_ids", 2),
    ("stop_strings", "end"),
    ("stop_strings", [""]),
    ("stop_strings", [3]),
    ("stop_strings", None),
]


@pytest.mark.parametrize("name,value", BAD_OPTIONS)
def test_options_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be"):
        SamplingOptions(**{name: value})  # type: ignore[arg-type]


def test_iterators_of_stops_are_not_used_up_by_their_checks() -> None:
    options = SamplingOptions(stop_ids=iter([3, 4]), stop_strings=iter(["a"]))  # type: ignore[arg-type]
    assert (options.stop_ids, options.stop_strings) == ((3, 4), ("a",))


@pytest.mark.parametrize("top", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_the_least_temperature_is_greedy(top: dict[str, Any]) -> None:
    scores_V = scores(1)
    chosen = Sampler(SamplingOptions(temperature=1e-307, seed=0, **top)).choose(100 * scores_V, np.zeros(V, dtype=bool))
    assert chosen == scores_V.argmax()
