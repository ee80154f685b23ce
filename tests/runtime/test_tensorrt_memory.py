"""The TensorRT backend's memory on a double of a GPU: constant, refused where it is short, sound after interrupts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from runtime import BackendError, Session, SessionError, load
from runtime.rolling_kv import kv_bytes
from runtime.tensorrt.rings import Rings
from tests.support.engine_doubles import ROLLING, embedded, unbound
from tests.support.gpu_double import HostDevice
from tests.support.plan_double import SCRATCH_BYTES
from tests.support.toy_bundle import ToyModel, write_toy_bundle

MODEL = ToyModel(windows=(4, 6), chunk=3, seed=3)


def tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(count).integers(0, MODEL.vocab_size, count)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("toy"), MODEL)


@pytest.fixture
def other(bundle: Path) -> Session:
    return load(bundle, threads=1)


def assert_equal(ours: Session, other: Session, feeds: Sequence[Any]) -> None:
    for feed in feeds:
        assert np.array_equal(ours.forward(feed), other.forward(feed)), feed


@pytest.mark.parametrize("plugins", [ROLLING, ()], ids=["in place", "turning"])
def test_memory_does_not_grow(bundle: Path, plugins: Sequence[str]) -> None:
    doubled = embedded(bundle, plugins=plugins)
    expected = kv_bytes(
        [MODEL.capacity(layer) for layer in range(2)],
        batch=1, num_kv_heads=MODEL.num_kv_heads, head_dim=MODEL.head_dim, dtype="float32",
    )  # fmt: skip
    assert doubled.session.kv_bytes == expected * (1 if plugins else 2)
    doubled.session.forward(tokens(9))
    doubled.session.forward([1])
    held = doubled.device.held
    for count in (30, 1, 1, 2, 3):
        doubled.session.forward(tokens(count))
    assert doubled.device.held == held
    for _ in range(3):
        for batch in (3, 1):
            doubled.session.reset()
            doubled.session.forward([tokens(9)] * batch)
            doubled.session.forward([[1]] * batch)
    assert doubled.device.held == held
    assert doubled.session.kv_bytes == expected * (1 if plugins else 2)


def test_rows_that_do_not_fit_are_refused_and_fewer_go_on(bundle: Path, other: Session) -> None:
    doubled = embedded(bundle)
    doubled.session.forward(tokens(7))
    doubled.device.capacity = doubled.device.held
    doubled.session.forward(tokens(7))
    doubled.session.reset()
    with pytest.raises(BackendError, match="too little memory"):
        doubled.session.forward([tokens(7)] * 4)
    assert doubled.session.batch == 1
    with pytest.raises(SessionError, match=r"reset\(\)"):
        doubled.session.forward([1])
    none = np.zeros((1, 0), np.int64)
    with pytest.raises(SessionError, match="no KV buffers"):
        doubled.engine.step(np.ones((1, 1), np.int64), none[0], none[0], none)
    doubled.session.reset()
    assert_equal(doubled.session, other, [tokens(7), [1]])


@pytest.fixture
def short_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[HostDevice]]:
    """Lets no device have memory for what is named so. Returns the devices that were asked."""
    real = HostDevice.allocate

    def limit(words: str) -> list[HostDevice]:
        asked: list[HostDevice] = []

        def allocate(device: HostDevice, nbytes: int, what: str) -> Any:
            asked.append(device)
            if what.startswith(words):
                raise BackendError(f"too little memory for {what}")
            return real(device, nbytes, what)

        monkeypatch.setattr(HostDevice, "allocate", allocate)
        return asked

    return limit


def test_rows_that_fit_in_part_leave_nothing_behind_even_while_their_error_is_kept(
    bundle: Path, short_of: Callable[[str], list[HostDevice]]
) -> None:
    doubled = embedded(bundle)
    rings = doubled.session.kv_bytes
    short_of("the logits of 4 tokens")
    with pytest.raises(BackendError, match="too little memory") as kept:
        doubled.session.forward([tokens(7)] * 4)
    assert not any(region.alive and region.bytes.nbytes >= 4 * rings for region in doubled.device._regions)
    doubled.session.reset()
    assert doubled.session.forward(tokens(7)).shape == (1, 7, MODEL.vocab_size)
    assert "logits of 4" in str(kept.value)


def test_weights_leave_when_the_rest_does_not_fit(bundle: Path, short_of: Callable[[str], list[HostDevice]]) -> None:
    for words in ("the intermediate values", "the KV buffers"):
        asked = short_of(words)
        with pytest.raises(BackendError, match="too little memory") as kept:
            unbound(bundle)
        assert asked[-1].held < 2 * SCRATCH_BYTES, kept.value


def interrupt(*_: Any, **__: Any) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["copy_in", "copy_out", "synchronize", "begin_capture", "end_capture"])
def test_an_interrupt_at_any_place_leaves_a_session_that_a_reset_mends(
    bundle: Path, other: Session, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    doubled = embedded(bundle)
    doubled.session.forward([1])
    with monkeypatch.context() as patch:
        real = getattr(HostDevice, where)

        def ended(device: HostDevice) -> NoReturn:
            real(device)
            raise KeyboardInterrupt

        patch.setattr(HostDevice, where, ended if where == "end_capture" else interrupt)
        with pytest.raises(KeyboardInterrupt):
            doubled.session.forward([1])
    with pytest.raises(SessionError, match=r"reset\(\)"):
        doubled.session.forward([1])
    doubled.session.reset()
    assert_equal(doubled.session, other, [[2], [3], [4], tokens(5)])


def test_an_interrupted_reset(bundle: Path, other: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = embedded(bundle)
    doubled.session.forward(tokens(5))
    with monkeypatch.context() as patch:
        patch.setattr(Rings, "clear", interrupt)
        with pytest.raises(KeyboardInterrupt):
            doubled.session.reset()
    doubled.session.reset()
    assert_equal(doubled.session, other, [tokens(5)])
