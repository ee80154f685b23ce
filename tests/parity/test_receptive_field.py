"""How far a token reaches: L·(W − 1) positions ahead, not one further, and never back or into another row.

Outside that reach the logits must not move by one bit: nothing of an engine's state may hold an older token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.bundles import exported
from tests.support.parity import Logits, Rows, feed, random_rows, uneven_feeds

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "chunk below the window": (3, {}),
    "chunk at the window": (5, {}),
    "chunk far above the window": (64, {}),
    "five layers": (4, {"num_layers": 5}),
    "window of one": (4, {"window": 1, "num_kv_heads": 1, "head_dim": 12, "activation": "sigmoid"}),
    "mixture of experts": (4, {"architecture": "mixtral"}),
}


def with_other_token(row: list[int], position: int, vocab_size: int) -> list[int]:
    return [*row[:position], (row[position] + 1) % vocab_size, *row[position + 1 :]]


def moved(before: Logits, after: Logits, row: int) -> list[int]:
    """Positions whose logits differ in any bit."""
    differs_T = (before[row].view(np.uint32) != after[row].view(np.uint32)).any(axis=-1)
    return [int(position) for position in np.flatnonzero(differs_T)]


@pytest.mark.parametrize("name", CASES)
def test_a_changed_token_moves_exactly_the_positions_that_it_reaches(name: str) -> None:
    chunk, settings = CASES[name]
    case = exported(chunk=chunk, **settings)
    config = case.opened().config
    window = config.layer_windows[0]
    assert window is not None
    reach = config.num_layers * (window - 1)
    length = 3 * reach + 12
    session = case.session()
    rows = random_rows([length], config.vocab_size, seed=1)
    for seed, position in enumerate((0, window, reach + 1, length - reach - 1, length - 1)):
        changed: Rows = [with_other_token(rows[0], position, config.vocab_size)]
        # Both texts are cut at the same places: other shapes may round otherwise.
        before = feed(session, uneven_feeds(rows, seed))
        after = feed(session, uneven_feeds(changed, seed))
        positions = moved(before, after, 0)
        assert positions[0] == position
        assert positions[-1] == min(position + reach, length - 1)


def test_rows_do_not_touch_each_other() -> None:
    case = exported(chunk=3)
    vocab_size = case.opened().config.vocab_size
    session = case.session()
    rows = random_rows([30, 17, 9], vocab_size, seed=2)
    before = feed(session, uneven_feeds(rows, 0))
    after = feed(session, uneven_feeds([rows[0], with_other_token(rows[1], 3, vocab_size), rows[2]], 0))
    assert [bool(moved(before, after, row)) for row in range(3)] == [False, True, False]


def test_what_was_before_a_reset_is_gone() -> None:
    session = exported(chunk=3).session()
    text, other = random_rows([12, 40], 64, seed=3)
    before = feed(session, [[text]])
    feed(session, [[other]])
    assert moved(before, feed(session, [[text]]), 0) == []
