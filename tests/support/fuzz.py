"""Runs damaged files through a reader, and holds every outcome to one rule: success, or a refusal of our own.

Also a failure: a refusal whose text is not one short printable paragraph (a name out of the file could otherwise break
lines or drive a terminal), a case that does not end, and one that needs more memory than is left under the limit.

A case is its seed. `CIERZO_FUZZ=FIRST:COUNT` runs other seeds than the committed ones, or one case again.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from runtime.errors import CierzoError
from tests.support.mutate import Mutator
from tests.support.mutate_files import NO_FILES

HEADROOM = 256 << 20
"""Bytes of address space beyond those in use. No damaged file of a few MB may make a reader ask for more."""

MOST_GROWTH = 48 << 20
"""Bytes by which the memory in use may differ between a quarter of a run and its end."""

_OTHER_SEEDS = "CIERZO_FUZZ"
_LONGEST_MESSAGE = 2500
HANGING_SECONDS = 30.0  # a case takes milliseconds: no machine is so busy that a healthy one takes this long
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Target:
    """The file `file` of the intact folder `folder`, and how to damage its content."""

    folder: Path
    file: str
    mutate: Mutator


@dataclass(slots=True)
class Outcome:
    """How the cases of a run ended. refused: by class of the error. failures: what broke the rule, one text each."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    growth: int = 0

    def __str__(self) -> str:
        return f"{self.accepted} accepted, refused {dict(self.refused)}, memory {self.growth >> 20:+d} MiB"


class _Hang(BaseException):
    """Not an Exception, so that no reader catches it."""


def fuzz(
    targets: Sequence[Target], read: Callable[[Path, Random], object], scratch: Path, *, first: int, count: int
) -> Outcome:
    """Damage one of `targets` with each seed from `first` on and call `read` with the folder that then holds it.

    read: gets the random numbers of the case as well, in case it has a choice to make.
    """
    if _OTHER_SEEDS in os.environ:
        first, count = map(int, os.environ[_OTHER_SEEDS].split(":"))
    outcome = Outcome()
    with _limited_memory():
        before = _resident()
        for seed in range(first, first + count):
            if seed == first + count // 4:
                before = _resident()
            _run_case(targets, read, scratch / str(seed), seed, outcome)
        outcome.growth = _resident() - before
    return outcome


def assert_kept_the_rule(outcome: Outcome, *, accepted: int, **refused: int) -> None:
    """No failures and no growth; the message names the seeds, each of which replays its case.

    accepted, refused: the least numbers of cases that end so, lest all of them stop at the reader's first line. They
    are those of the committed seeds and not held against any others.
    """
    shown = "\n\n".join(outcome.failures[:5])
    assert not outcome.failures, f"{len(outcome.failures)} cases failed ({outcome}); the first:\n\n{shown}"
    assert outcome.growth <= MOST_GROWTH, f"the memory in use grew: {outcome}"
    if _OTHER_SEEDS not in os.environ:
        assert outcome.accepted >= accepted, f"hardly any case was accepted: {outcome}"
        assert all(outcome.refused[name] >= least for name, least in refused.items()), f"hardly any refused: {outcome}"


def _run_case(
    targets: Sequence[Target], read: Callable[[Path, Random], object], folder: Path, seed: int, outcome: Outcome
) -> None:
    random = Random(seed)
    target = random.choice(targets)
    shutil.copytree(target.folder, folder)
    file = folder / target.file
    name = f"{_OTHER_SEEDS}={seed}:1 ({target.folder.name}/{target.file}"
    if random.random() < 0.03:
        kind = random.choice(sorted(NO_FILES))
        NO_FILES[kind](file)
        name += f" is {kind})"
    else:
        file.write_bytes(target.mutate(random, file.read_bytes()))
        name += f" damaged by {getattr(target.mutate, '__name__', 'a mutator')})"
    try:
        with _watchdog():
            read(folder, random)
        outcome.accepted += 1
    except CierzoError as error:
        outcome.refused[type(error).__name__] += 1
        if problem := _problem(str(error)):
            outcome.failures.append(f"{name}: the message is {problem}: {str(error)[:300]!a}\n{_where(error)}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # MemoryError, _Hang, and what a library in Rust makes of a panic
        outcome.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]!a}\n{_where(error)}")
    finally:
        shutil.rmtree(folder)


def _problem(message: str) -> str | None:
    if not message.isprintable():
        return "not printable"
    if len(message) > _LONGEST_MESSAGE:
        return f"{len(message)} characters long"
    return None if message.rstrip().endswith((".", ")")) else "no sentence"


def _where(error: BaseException) -> str:
    """The last few places that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return "\n".join(f"    {frame.filename}:{frame.lineno} {frame.name}" for frame in frames)


@contextmanager
def _watchdog() -> Iterator[None]:
    def bark(signum: int, frame: FrameType | None) -> None:
        raise _Hang(f"no end after {HANGING_SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, HANGING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_pages(0) * _PAGE + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _resident() -> int:
    return _pages(1) * _PAGE


def _pages(column: int) -> int:
    """Pages of address space (0) or of memory in use (1)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[column])
