"""The ring form of the model against its full-context form: another way to the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reference.checkpoint import open_checkpoint
from reference.model import Model
from reference.step import Step, modulo, slot_positions, write_ring
from tests.support.bundles import checkpoint
from tests.support.parity import boundary_lengths, fill

Rings = list[tuple[Tensor, Tensor]]
WIDE = torch.float64  # so that what remains of an error is a mistake and not rounding

CASES: list[tuple[dict[str, Any], list[int | None]]] = [
    ({}, [5, 5]),
    ({"window": 1, "num_kv_heads": 1, "head_dim": 12}, [1, 1]),
    ({"window": None, "tie": True}, [None, None]),
    ({"architecture": "ministral", "num_layers": 3, "layer_windows": [4, None, 4]}, [4, None, 4]),
    ({"architecture": "mixtral", "num_experts": 8, "top_k": 3}, [5, 5]),
    ({"architecture": "qwen3", "attention_bias": True, "window": None}, [None, None]),
    ({"architecture": "ministral3"}, [5, 5]),
]
LONGEST = 40


def both(settings: dict[str, Any]) -> tuple[Model, Step]:
    opened = open_checkpoint(checkpoint(**settings))
    return tuple(fill(kind(opened.config, device="meta", dtype=WIDE), opened, WIDE) for kind in (Model, Step))  # type: ignore[return-value]


def empty_rings(step: Step, slots: list[int], batch: int) -> Rings:
    config = step.config
    shapes = [(batch, config.num_kv_heads, size, config.head_dim) for size in slots]
    return [(torch.zeros(shape, dtype=WIDE), torch.zeros(shape, dtype=WIDE)) for shape in shapes]


def run(step: Step, ids: Tensor, slots: list[int], chunk: int, seed: int) -> Tensor:
    """Logits of all tokens; each row takes 0 to `chunk` tokens at a time, the rest of its chunk is padding."""
    rng = np.random.default_rng(seed)
    batch, length = ids.shape
    rings = empty_rings(step, slots, batch)
    start = np.zeros(batch, dtype=np.int64)
    logits = torch.full((batch, length, step.config.vocab_size), torch.nan, dtype=WIDE)
    while (start < length).any():
        count = np.minimum(rng.integers(0, chunk + 1, batch), length - start)
        padded = torch.full((batch, chunk), 63)
        for row in range(batch):
            padded[row, : count[row]] = ids[row, start[row] : start[row] + count[row]]
        every = torch.arange(chunk).expand(batch, chunk)
        out, rings = step(padded, torch.from_numpy(start), torch.from_numpy(count), every, rings)
        for row in range(batch):
            logits[row, start[row] : start[row] + count[row]] = out[row, : count[row]]
        start = start + count
    return logits


@pytest.mark.parametrize("chunk", [1, 3, 5, 8])
@pytest.mark.parametrize("settings,windows", CASES, ids=lambda value: str(value))
def test_a_ring_of_w_plus_t_minus_1_slots_is_enough(
    settings: dict[str, Any], windows: list[int | None], chunk: int
) -> None:
    model, step = both(settings)
    slots = [LONGEST if window is None else window + chunk - 1 for window in windows]
    sliding = [window for window in windows if window is not None]
    for length in [*boundary_lengths(max(sliding, default=4), chunk), LONGEST]:
        ids = torch.randint(0, 64, (3, length), generator=torch.Generator().manual_seed(length))
        logits = run(step, ids, slots, chunk, seed=length)
        assert torch.allclose(logits, model(ids), rtol=0, atol=1e-11), length


@pytest.mark.parametrize("chunk", [1, 4])
def test_every_layer_may_have_a_window_of_its_own(chunk: int) -> None:
    windows = [3, None, 7, 1]
    opened = open_checkpoint(checkpoint(num_layers=4))
    config = replace(opened.config, layer_windows=tuple(windows))
    own = replace(opened, config=config)
    model = fill(Model(config, device="meta", dtype=WIDE), own, WIDE)
    step = fill(Step(config, device="meta", dtype=WIDE), own, WIDE)
    slots = [LONGEST if window is None else window + chunk - 1 for window in windows]
    ids = torch.randint(0, 64, (3, LONGEST), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(run(step, ids, slots, chunk, seed=1), model(ids), rtol=0, atol=1e-11)


def test_one_slot_less_is_too_few() -> None:
    model, step = both({})
    ids = torch.randint(0, 64, (1, 30), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(run(step, ids, [7, 7], 3, seed=2), model(ids), rtol=0, atol=1e-11)
    assert not torch.allclose(run(step, ids, [6, 6], 3, seed=2), model(ids), rtol=0, atol=1e-3)


def test_padding_and_idle_rows_leave_every_bit_of_the_rings() -> None:
    _, step = both({})
    generator = torch.Generator().manual_seed(1)
    before: Rings = [
        (
            torch.randn(key.shape, generator=generator, dtype=WIDE),
            torch.randn(value.shape, generator=generator, dtype=WIDE),
        )
        for key, value in empty_rings(step, [7, 7], 3)
    ]
    kept = [(key.clone(), value.clone()) for key, value in before]
    start, count = torch.tensor([12, 20, 6]), torch.tensor([1, 0, 3])
    none, after = step(torch.full((3, 3), 9), start, count, torch.zeros((3, 0), dtype=torch.int64), before)
    assert none.shape == (3, 0, step.config.vocab_size)
    written = {0: [5], 1: [], 2: [0, 1, 6]}
    for now, then, untouched in zip(after, before, kept, strict=True):
        for ring, old, same in zip(now, then, untouched, strict=True):
            assert torch.equal(old, same), "the inputs are read only"
            for row, slots in written.items():
                changed = (ring[row] != old[row]).any(dim=2).any(dim=0)
                assert torch.nonzero(changed)[:, 0].tolist() == slots


def test_logits_are_those_of_the_tokens_asked_for() -> None:
    _, step = both({})
    ids = torch.randint(0, 64, (2, 4), generator=torch.Generator().manual_seed(1))
    start, count, rings = torch.tensor([0, 0]), torch.tensor([4, 3]), empty_rings(step, [8, 8], 2)
    every, rolled = step(ids, start, count, torch.arange(4).expand(2, 4), rings)
    choices: list[list[list[int]]] = [[[3], [2]], [[2, 0], [1, 1]], [[0, 1, 2, 3, 3], [0, 2, 0, 2, 0]], [[], []]]
    for asked in choices:
        position = torch.tensor(asked, dtype=torch.int64)
        some, same = step(ids, start, count, position, rings)
        index = position[:, :, None].expand(*position.shape, step.config.vocab_size)
        assert torch.allclose(some, every.gather(1, index), rtol=0, atol=1e-13)
        for ours, theirs in zip(same, rolled, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


def test_the_worked_example_of_the_file() -> None:
    held = slot_positions(torch.tensor([8]), torch.tensor([2]), 6)
    assert held.tolist() == [[6, 7, 8, 9, 4, 5]]
    ring = torch.arange(6, dtype=torch.float32).view(1, 1, 6, 1)
    new = torch.tensor([80.0, 90.0, 100.0]).view(1, 1, 3, 1)
    written = write_ring(ring, new, torch.tensor([[8, 9, 10]]), torch.tensor([[True, True, False]]))
    assert written.flatten().tolist() == [0, 1, 80, 90, 4, 5]


@pytest.mark.parametrize("slots", [1, 4, 7])
def test_slot_positions_by_writing_one_after_the_other(slots: int) -> None:
    held = [-1] * slots
    for position in range(3 * slots + 2):
        held[position % slots] = position
        found = slot_positions(torch.tensor([position]), torch.tensor([1]), slots)[0].tolist()
        assert [max(p, -1) for p in found] == held
        idle = slot_positions(torch.tensor([position + 1]), torch.tensor([0]), slots)[0].tolist()
        assert idle == found, "a row that takes nothing holds what it held"
    assert max(slot_positions(torch.tensor([0]), torch.tensor([0]), slots)[0].tolist()) < 0


def test_modulo_is_never_negative() -> None:
    assert modulo(torch.tensor([-7, -1, 0, 6, 7]), 7).tolist() == [0, 6, 0, 6, 0]
