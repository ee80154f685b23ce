"""What the checks on a GPU find out, kept line by line in a file, so that it outlives the process that found it.

Each part of the script runs in a process of its own: a kernel that writes where it must not ends that process, and
what was found until then still counts.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_KEPT_TEXT = 1500


@dataclass(frozen=True, slots=True)
class Check:
    """worst: the largest error as a share of what is allowed, where there is such a number. said: why it fails."""

    section: str
    name: str
    held: bool
    worst: float | None = None
    said: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """figure: in `unit`. share: of what `against` names. target: the least share, where one is set."""

    section: str
    name: str
    microseconds: float
    figure: float
    unit: str
    share: float | None = None
    against: str = ""
    target: float | None = None

    @property
    def reached(self) -> bool | None:
        return None if self.target is None or self.share is None else self.share >= self.target


@dataclass(frozen=True, slots=True)
class Skip:
    """What was not done, and why. expected: nobody meant it to be done here, so it does not change the exit code."""

    section: str
    name: str
    reason: str
    expected: bool = False


@dataclass(frozen=True, slots=True)
class Fact:
    """Something measured or read that others need: a ceiling, a version, what a library answered."""

    name: str
    value: Any


@dataclass(frozen=True, slots=True)
class Launched:
    """A kernel that ran, as `described` spells it."""

    kernel: str


Finding = Check | Timing | Skip | Fact | Launched
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Check, Timing, Skip, Fact, Launched)}


def write_finding(finding: Finding) -> str:
    """As one line of JSON."""
    return json.dumps({"kind": type(finding).__name__, **asdict(finding)}, ensure_ascii=False)


def read_findings(text: str) -> list[Finding]:
    """Those of whole lines: a process that was ended may have left half a one."""
    found = []
    for line in text.splitlines():
        try:
            document = json.loads(line)
            found.append(_KINDS[document.pop("kind")](**document))
        except (ValueError, KeyError, TypeError):
            continue
    return found


class OutOfTimeError(Exception):
    """Not a failure: what remains of a part is left out."""


class ContextLostError(Exception):
    """A kernel did what ends all use of the GPU by its process: what remains needs another one."""


_ENDS_ALL = (
    *("illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction"),
    *(
        "hardware stack error",
        "invalid program counter",
        "device-side assert",
        "uncorrectable",
        "invalid address space",
    ),
)
"""What CUDA says of errors after which every call of the process fails."""


class Notebook:
    """Where a part writes down what it finds, a line of progress for each.

    section: named in all of it. path: of the file, or None to keep all in `findings` alone. seconds: until nothing new
    is begun. seed: what all random inputs of the part are drawn from. passed: how many of the part's checks a process
    before this one has run. done: how many there have been.
    """

    def __init__(
        self,
        section: str,
        *,
        seed: int,
        path: Path | None = None,
        seconds: float = math.inf,
        say: Callable[[str], None] = print,
        known: Iterable[Fact] = (),
        passed: int = 0,
    ) -> None:
        self.section, self.seed = section, seed
        self.findings: list[Finding] = []
        self.known = {fact.name: fact.value for fact in known}
        self._path, self._say = path, say
        self._seconds, self._end = seconds, math.inf
        self._launched: set[str] = set()
        self.done, self._passed = 0, passed

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(write_finding(finding) + "\n")
        line = spoken(finding)
        if line:
            self._say(line)

    def check(self, name: str, run: Callable[[], float | None]) -> bool:
        """Run a check; whatever it raises is why it does not hold. run: returns the share of what is allowed, or None.

        Raises OutOfTimeError when the part's time is over, ContextLostError if the GPU can be used no more.
        """
        if not self._begin(name):
            return True
        try:
            worst = run()
            held, said = worst is None or worst <= 1, ""
        except Exception as error:
            worst, held, said = None, False, told(error)
        self.add(Check(self.section, name, held, None if worst is None else float(worst), said))
        _raise_if_lost(said)
        return held

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        """Run something that adds its own findings; whatever it raises becomes a check that does not hold."""
        if not self._begin(name):
            return
        try:
            run()
        except (OutOfTimeError, ContextLostError):
            raise
        except Exception as error:
            said = told(error)
            self.add(Check(self.section, name, False, None, said))
            _raise_if_lost(said)

    def skip(self, name: str, reason: str, *, expected: bool = False) -> None:
        self.add(Skip(self.section, name, reason, expected))

    def fact(self, name: str, value: Any) -> None:
        self.known[name] = value
        self.add(Fact(name, value))

    def launched(self, kernel: str) -> None:
        if kernel not in self._launched:
            self._launched.add(kernel)
            self.add(Launched(kernel))

    def _begin(self, name: str) -> bool:
        """Whether this process has to run it. Keeps its name, in case that the process does not survive it."""
        self.done += 1
        if self.done <= self._passed:
            return False
        if self._end == math.inf:  # only now, when all packages are loaded
            self._end = time.monotonic() + self._seconds
        if time.monotonic() > self._end:
            self.skip(f"{name} and what follows", "the time for this part was over")
            raise OutOfTimeError
        if self._path is not None:
            now_path(self._path).write_text(json.dumps([self.done, name]), encoding="utf-8")
        return True


def now_path(path: Path) -> Path:
    """Where a Notebook of this path keeps the number and name of the check that it is at."""
    return path.with_suffix(".now")


def _raise_if_lost(said: str) -> None:
    if any(words in said for words in _ENDS_ALL):
        raise ContextLostError


def told(error: BaseException) -> str:
    """An exception as a line: where in our files it was raised, its type and its text."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{where}: {text}"[:_KEPT_TEXT]


def spoken(finding: Finding) -> str:
    """The line of progress."""
    match finding:
        case Check(section, name, held, worst, said):
            share = "" if worst is None else f", {worst:.2f} of the budget"
            return f"{'ok    ' if held else 'FAILED'} {section}: {name}{share}{': ' + said if said else ''}"
        case Timing():
            share = "" if finding.share is None else f", {finding.share:.2f} of {finding.against}"
            target = {None: "", True: " (reached)", False: f" (target {finding.target} MISSED)"}[finding.reached]
            return (
                f"time   {finding.section}: {finding.name}: {finding.microseconds:.1f} µs, "
                f"{finding.figure:.4g} {finding.unit}{share}{target}"
            )
        case Skip(section, name, reason):
            return f"not    {section}: {name}: {reason}"
        case Fact(name, value):
            return f"fact   {name}: {value:.5g}" if isinstance(value, float) else f"fact   {name}: {value}"
    return ""
