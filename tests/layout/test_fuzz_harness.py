"""The harness of the fuzz tests finds what it is there to find, and a seed replays its case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from runtime.errors import BundleError
from tests.support import fuzz as harness
from tests.support.fuzz import Target, assert_kept_the_rule, fuzz
from tests.support.mutate import mutate_json
from tests.support.mutate_files import mutate_safetensors

DOCUMENT = b'{"a": {"b": [1, 2.5, null]}, "c": "text", "d": true}'


def _raises(error: BaseException) -> Callable[[Path, Random], None]:
    def read(folder: Path, random: Random) -> None:
        raise error

    return read


def _hang(folder: Path, random: Random) -> None:
    while True:
        pass


def _fill_memory(folder: Path, random: Random) -> None:
    bytearray(4 * harness.HEADROOM)


def _recurse(folder: Path, random: Random) -> None:
    _recurse(folder, random)


@pytest.fixture(autouse=True)
def _committed_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIERZO_FUZZ", raising=False)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    folder = tmp_path / "intact"
    folder.mkdir()
    (folder / "x.json").write_bytes(DOCUMENT)
    return Target(folder, "x.json", mutate_json)


@pytest.mark.parametrize(
    "read, words",
    [
        (_raises(KeyError("x")), "KeyError"),
        (_raises(SystemExit()), "SystemExit"),
        (_recurse, "RecursionError"),
        (_fill_memory, "MemoryError"),
        (_hang, "_Hang: 'no end after"),
        (_raises(BundleError("two\nlines.")), "the message is not printable"),
        (_raises(BundleError("a \x1b[31m.")), "the message is not printable"),
        (_raises(BundleError("x" * 10_000 + ".")), "the message is 10001 characters long"),
        (_raises(BundleError("no end")), "the message is no sentence"),
    ],
    ids=["foreign", "exit", "recursion", "memory", "hang", "lines", "escape", "long", "sentence"],
)
def test_finds(
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path, Random], None],
    words: str,
) -> None:
    monkeypatch.setattr(harness, "HANGING_SECONDS", 0.2)
    outcome = fuzz([target], read, tmp_path / "cases", first=7, count=1)
    (failure,) = outcome.failures
    assert words in failure
    assert failure.startswith("CIERZO_FUZZ=7:1 (intact/x.json ")
    with pytest.raises(AssertionError, match="1 cases failed"):
        assert_kept_the_rule(outcome, accepted=0)


def test_finds_growth(target: Target, tmp_path: Path) -> None:
    kept: list[bytes] = []
    outcome = fuzz([target], lambda *_: kept.append(b"x" * (1 << 22)), tmp_path / "cases", first=0, count=40)
    assert not outcome.failures
    with pytest.raises(AssertionError, match="memory in use grew"):
        assert_kept_the_rule(outcome, accepted=0)


def test_a_refusal_and_a_success_are_none_of_them(target: Target, tmp_path: Path) -> None:
    def read(folder: Path, random: Random) -> None:
        if random.random() < 0.5:
            raise BundleError("The manifest is damaged. Export again.")

    outcome = fuzz([target], read, tmp_path / "cases", first=0, count=40)
    assert_kept_the_rule(outcome, accepted=5, BundleError=5)
    with pytest.raises(AssertionError, match="hardly any case was accepted"):
        assert_kept_the_rule(outcome, accepted=41)
    with pytest.raises(AssertionError, match="hardly any refused"):
        assert_kept_the_rule(outcome, accepted=5, ConfigError=1)
    assert not list((tmp_path / "cases").iterdir())


def test_one_seed_runs_again(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes | None] = []

    def read(folder: Path, random: Random) -> None:
        file = folder / "x.json"
        seen.append(file.read_bytes() if file.is_file() and file.stat().st_size < 1 << 20 else None)

    fuzz([target], read, tmp_path / "cases", first=100, count=20)
    monkeypatch.setenv("CIERZO_FUZZ", "107:1")
    fuzz([target], read, tmp_path / "cases", first=100, count=20)
    assert len(seen) == 21
    assert seen[7] == seen[20]
    assert len(set(seen)) > 15


def test_mutators_repeat_themselves_and_nothing_else() -> None:
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for mutate, content in (
        (mutate_json, DOCUMENT),
        (mutate_safetensors, len(header).to_bytes(8, "little") + header + bytes(8)),
    ):
        damaged = [mutate(Random(seed), content) for seed in range(200)]
        assert damaged == [mutate(Random(seed), content) for seed in range(200)]
        assert len(set(damaged)) > 100
        assert sum(one == content for one in damaged) < 10
