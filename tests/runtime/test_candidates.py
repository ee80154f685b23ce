"""Choosing among the highest logits alone: the same ids as from all logits, or all logits are fetched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import Session, SessionError
from runtime.bundle import Bundle, read_bundle
from runtime.sampling import Sampler, SamplingOptions
from tests.support.top_engine import open_top
from tests.support.toy_bundle import ToyModel, write_toy_bundle

MODEL = ToyModel(windows=(4, 6), chunk=3, seed=3)
V = 50
NONE_SEEN = np.zeros(V, bool)


def highest(logits_V: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The highest logits, best first, and their ids."""
    order = np.argsort(-logits_V, kind="stable")[:count]
    return logits_V[order], order.astype(np.int64)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.2, "top_k": 7},
    {"temperature": 3.0, "top_k": 9},
    {"temperature": 1.0, "top_k": 9, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 9, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1e-300, "top_k": 5},
]


def steep(random: np.random.Generator) -> NDArray[Any]:
    """Of which most differ from the highest by the same number, as far as float64 can tell."""
    return np.asarray(random.normal(0, 1, V) * 10.0 ** random.integers(-20, 20, V))


LOGITS: dict[str, Callable[[np.random.Generator], NDArray[Any]]] = {
    "plain": lambda random: random.normal(0, 3, V),
    "ties": lambda random: random.integers(0, 8, V),
    "few": lambda random: np.where(random.random(V) < 0.9, -np.inf, np.arange(V) % 5),
    "steep": steep,
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_what_suffices_gives_the_same_draws(fields: dict[str, Any], kind: str) -> None:
    told = 0
    for seed in range(60):
        options = SamplingOptions(seed=seed, **fields)
        logits_V = LOGITS[kind](np.random.default_rng(seed)).astype(np.float32)
        among, of_all = Sampler(options), Sampler(options)
        count = among.highest_wanted(10)
        assert count == (1 if options.temperature == 0 else 10)
        values_K, ids_K = highest(logits_V, count)
        if not among.suffice(values_K):
            continue
        told += 1
        order = ids_K.argsort()
        for _ in range(5):
            chosen = among.choose(values_K[order], NONE_SEEN, ids_K[order])
            assert chosen == of_all.choose(logits_V, NONE_SEEN)
    assert told >= (1 if kind == "ties" else 30)


def test_a_tie_that_may_go_on_does_not_suffice() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, top_k=3, seed=0))
    assert sampler.suffice(np.array([5, 4, 3, 2], np.float32))
    assert sampler.suffice(np.array([5, 3, 3, 3, 2], np.float32))
    assert not sampler.suffice(np.array([5, 3, 3, 3, 3], np.float32))
    assert sampler.suffice(np.array([5, 3, 3, -np.inf, -np.inf], np.float32))
    assert sampler.suffice(np.array([5, -np.inf, -np.inf, -np.inf], np.float32))
    # Of which the difference to the highest is the same.
    assert not sampler.suffice(np.array([1e30, 3, 2, 1], np.float32))
    # Nothing else would make these finite.
    assert sampler.suffice(np.array([np.nan, 1, 1, 1], np.float32))
    assert sampler.suffice(np.array([np.inf, 1, 1, 1], np.float32))


@pytest.mark.parametrize(
    "fields, most, wanted",
    [
        ({}, 64, 1),
        ({}, 0, 0),
        ({"repetition_penalty": 1.1}, 64, 0),
        ({"temperature": 1.0}, 64, 0),
        ({"temperature": 1.0, "top_p": 0.5}, 64, 0),
        ({"temperature": 1.0, "top_k": 63}, 64, 64),
        ({"temperature": 1.0, "top_k": 64}, 64, 0),
        ({"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.1}, 64, 0),
    ],
)
def test_how_many_are_wanted(fields: dict[str, Any], most: int, wanted: int) -> None:
    assert Sampler(SamplingOptions(**fields)).highest_wanted(most) == wanted


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(write_toy_bundle(tmp_path_factory.mktemp("toy"), MODEL))


def rounded(logits_BRV: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of which many are equal, as those of an engine that computes in 8 bits are."""
    return np.asarray(np.round(logits_BRV * 2) / 2, np.float32)


PROMPTS = [[1, 5, 7, 9, 11, 13, 4], [6], [8, 3, 20, 30]]


@pytest.mark.parametrize("change", [None, rounded], ids=["plain", "ties"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            {"temperature": 1.4, "seed": 2, **more}
            for more in ({"top_k": 4}, {"top_k": 11, "top_p": 0.9}, {"top_k": 12})
        ),
    ],
    ids=str,
)
def test_a_generation_chooses_the_same_ids(bundle: Bundle, options: dict[str, Any], change: Any) -> None:
    (ours, engine), (all_logits, _) = open_top(bundle, 12, change), open_top(bundle, 0, change)
    found = [s.generate_batch(PROMPTS, max_new_tokens=15, stop_ids=[], **options) for s in (ours, all_logits)]
    assert found[0] == found[1]
    wanted = {None: 1, 4: 12, 11: 12, 12: None}[options.get("top_k")]
    assert set(engine.asked) == ({wanted} if wanted else set())
    if change is rounded and options.get("top_k") == 11:
        assert engine.fetched > 0, "no tie reached the end, so that falling back was not tried"
    if change is None or not options:
        assert engine.fetched == 0


@pytest.fixture
def session(bundle: Bundle) -> Session:
    return open_top(bundle, 12)[0]


def test_candidates_of_a_feed(bundle: Bundle, session: Session) -> None:
    expected = open_top(bundle, 0)[0]
    assert session.most_top == 12
    assert expected.most_top == 0
    for rows in ([[1, 5, 7, 9, 11], [6]], [[], [4]]):
        logits_BV = expected.forward_last(rows)
        kept = session.forward_candidates(rows, 5, lambda values_K: bool(values_K[0] > -1e9))
        for row, logits_V, found in zip(rows, logits_BV, kept, strict=True):
            if not row:
                assert found is None
                continue
            assert found is not None
            assert found.ids_N is not None
            assert found.ids_N.tolist() == sorted(highest(logits_V, 5)[1].tolist())
            assert np.array_equal(found.logits_N, logits_V[found.ids_N])
    whole = session.forward_candidates([[2], [3]], 5, lambda _: False)
    for logits_V, found in zip(expected.forward_last([[2], [3]]), whole, strict=True):
        assert found is not None
        assert found.ids_N is None
        assert np.array_equal(found.logits_N, logits_V)


def test_an_engine_may_know_more_of_them_than_there_are(bundle: Bundle) -> None:
    assert open_top(bundle, 64)[0].most_top == MODEL.vocab_size


@pytest.mark.parametrize("count", [0, 13])
def test_counts_that_the_engine_does_not_give_are_refused(session: Session, count: int) -> None:
    with pytest.raises(SessionError, match=f"12 highest logits at most, not {count}"):
        session.forward_candidates([1], count, lambda _: True)
    assert session.forward([1]).shape == (1, 1, MODEL.vocab_size)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 3}], ids=str)
def test_logits_that_are_not_finite_are_noticed(bundle: Bundle, options: dict[str, Any]) -> None:
    def broken(logits_BRV: NDArray[np.float32]) -> NDArray[np.float32]:
        changed = logits_BRV.copy()
        changed[..., 17] = np.nan
        return changed

    session, _ = open_top(bundle, 12, broken)
    with pytest.raises(SessionError, match="not finite"):
        next(session.generate([1], **options))


def test_candidates_after_pieces_are_those_after_the_whole(bundle: Bundle) -> None:
    one, other = open_top(bundle, 12)[0], open_top(bundle, 12)[0]
    text = PROMPTS[0]
    for token in text[:-1]:
        one.forward([token])
    (left,), (right,) = (
        s.forward_candidates([feed], 3, lambda _: True) for s, feed in ((one, text[-1:]), (other, text))
    )
    assert left is not None
    assert right is not None
    assert left.ids_N is not None
    assert right.ids_N is not None
    assert left.ids_N.tolist() == right.ids_N.tolist()
