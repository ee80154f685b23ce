"""Ring arithmetic against a ring that is really written, and the byte formula against real buffers."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.rolling_kv import RollingKV, kv_bytes, position_of_slot, required_capacity, slot_of_position


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8])
def test_position_of_slot_is_what_the_ring_holds(capacity: int) -> None:
    ring = [-1] * capacity
    for last in range(4 * capacity):
        ring[slot_of_position(last, capacity)] = last
        computed = [position_of_slot(slot, last, capacity) for slot in range(capacity)]
        assert [position if position >= 0 else -1 for position in computed] == ring


def test_positions_of_an_empty_ring_are_negative() -> None:
    assert all(position_of_slot(slot, -1, 4) < 0 for slot in range(4))


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_required_capacity_is_enough_and_one_less_is_not(window: int, chunk: int) -> None:
    def every_query_sees_its_window(capacity: int) -> bool:
        for start in range(3 * (window + chunk)):
            last = start + chunk - 1
            held = {position_of_slot(slot, last, capacity) for slot in range(capacity)}
            for query in range(start, start + chunk):
                if not set(range(max(0, query - window + 1), query + 1)) <= held:
                    return False
        return True

    capacity = required_capacity(window, chunk)
    assert every_query_sees_its_window(capacity)
    assert not every_query_sees_its_window(capacity - 1)


def test_bytes_of_the_buffers_follow_the_formula() -> None:
    kv = RollingKV([5, 9], batch=3, num_kv_heads=2, head_dim=4, dtype="float16")
    assert kv.nbytes == kv_bytes([5, 9], batch=3, num_kv_heads=2, head_dim=4, dtype="float16") == 2 * 3 * 2 * 4 * 2 * 14
    assert [layer.key_BGSD.shape for layer in kv.layers] == [(3, 2, 5, 4), (3, 2, 9, 4)]


def test_clear_removes_nan() -> None:
    kv = RollingKV([3], batch=1, num_kv_heads=1, head_dim=2, dtype="float32")
    kv.layers[0].key_BGSD[...] = np.nan
    kv.layers[0].value_BGSD[...] = np.inf
    kv.clear()
    assert not kv.layers[0].key_BGSD.any()
    assert not kv.layers[0].value_BGSD.any()
