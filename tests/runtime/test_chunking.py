"""Steps put together again are the rows that went in."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.chunking import Int64Array, Step, all_positions, last_positions, rows_that_end, split_into_steps


def steps_of(lengths: list[int], positions: list[int], chunk: int) -> tuple[list[Int64Array], list[Step]]:
    rows = [np.arange(100 * index + 1, 100 * index + 1 + length) for index, length in enumerate(lengths)]
    return rows, list(split_into_steps(rows, np.array(positions), chunk))


@pytest.mark.parametrize("lengths", [[1], [6, 3], [7, 0, 1], [0, 12], [4, 4], [5, 8, 3, 1]])
@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
def test_steps_reassemble_the_rows(lengths: list[int], chunk: int) -> None:
    positions = [7 * index for index in range(len(lengths))]
    rows, steps = steps_of(lengths, positions, chunk)
    fed: list[list[int]] = [[] for _ in rows]
    for step in steps:
        width = step.input_ids_BT.shape[1]
        assert width == step.token_counts_B.max()
        assert 1 <= width <= chunk
        for index, count in enumerate(step.token_counts_B):
            assert step.start_positions_B[index] == positions[index] + len(fed[index])
            assert count == 0 or step.offset == len(fed[index])
            assert not step.input_ids_BT[index, count:].any()
            fed[index] += step.input_ids_BT[index, :count].tolist()
    assert fed == [row.tolist() for row in rows]
    assert len(steps) == -(-max(lengths) // chunk)


def test_the_worked_example() -> None:
    _, (first, second) = steps_of([6, 3], [10, 20], 4)
    assert first.input_ids_BT.tolist() == [[1, 2, 3, 4], [101, 102, 103, 0]]
    assert (first.start_positions_B.tolist(), first.token_counts_B.tolist()) == ([10, 20], [4, 3])
    assert second.input_ids_BT.tolist() == [[5, 6], [0, 0]]
    assert (second.start_positions_B.tolist(), second.token_counts_B.tolist()) == ([14, 23], [2, 0])


@pytest.mark.parametrize("lengths", [[1], [6, 3], [7, 0, 1], [0, 12], [4, 4], [5, 8, 3, 1]])
@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
def test_each_row_is_asked_for_once_at_its_last_token(lengths: list[int], chunk: int) -> None:
    rows, steps = steps_of(lengths, [0] * len(lengths), chunk)
    asked: list[list[int]] = [[] for _ in rows]
    for step in steps:
        position_BR, ends_B = last_positions(step, np.array(lengths)), rows_that_end(step, np.array(lengths))
        assert position_BR.shape == (len(rows), int(ends_B.any())), "a step that ends no row asks for nothing"
        assert ((position_BR >= 0) & (position_BR < step.input_ids_BT.shape[1])).all()
        for index in np.flatnonzero(ends_B):
            asked[index].append(int(step.input_ids_BT[index, position_BR[index, 0]]))
    assert asked == [[int(row[-1])] if row.size else [] for row in rows]


def test_all_positions_are_those_of_every_token_and_of_padding() -> None:
    _, (first, second) = steps_of([6, 3], [10, 20], 4)
    assert all_positions(first).tolist() == [[0, 1, 2, 3]] * 2
    assert all_positions(second).tolist() == [[0, 1]] * 2


def test_nothing_to_feed_makes_no_step() -> None:
    assert steps_of([0, 0], [3, 4], 4)[1] == []
