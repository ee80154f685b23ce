"""One process per engine: commands come as JSON lines on standard input, answers go out the same way.

Every engine is measured by the loop in `Feeding`: ids go in, the logits after the last of them come out, one token at
a time while decoding, and sampling is left out for all. An engine that only generates brings a loop of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

FIRST_WORD = 259
"""The ids before it are <unk>, <s>, </s> and bytes; a text that is made up has none of them."""

Logits = NDArray[np.float32]


def made_up(seed: int, count: int, vocabulary: int) -> list[int]:
    """`count` random ids, different for every seed, so that no engine finds a prefix that it has cached."""
    return [int(token) for token in np.random.default_rng(seed).integers(FIRST_WORD, vocabulary, count)]


class Engine(ABC):
    """What a worker answers with. A slot is one text with its KV state; slots share the weights where they can."""

    @abstractmethod
    def load(self, path: str, threads: int, settings: Mapping[str, Any]) -> None:
        """Make ready to run."""

    @abstractmethod
    def run(self, slot: str, ids: Sequence[int], steps: int, resume: bool) -> tuple[float | None, list[float]]:
        """Seconds of reading `ids` from an empty state, and of each of `steps` tokens after them.

        resume: go on from where the slot's last run ended, and read nothing first.
        """

    @abstractmethod
    def answer(self, ids: Sequence[int]) -> dict[str, Any]:
        """What follows `ids`: `logits`, or `token` and its `logprob` from an engine that does not show logits."""

    def kv_bytes(self, slot: str, tokens: int) -> int | None:
        """Bytes that the KV state of a slot takes or would take for a text of so many tokens; None where unknown."""
        del slot, tokens
        return None


class Feeding(Engine):
    """An engine that can be fed token by token."""

    @abstractmethod
    def open(self, slot: str, capacity: int) -> None:
        """Empty the slot, and make room for `capacity` tokens."""

    @abstractmethod
    def feed(self, slot: str, ids: Sequence[int]) -> Logits:
        """Read ids after what the slot has read; float32 [V], the logits after the last."""

    def run(self, slot: str, ids: Sequence[int], steps: int, resume: bool) -> tuple[float | None, list[float]]:
        """As Engine.run; the slot's room is the same however often it is resumed, `SPARE` tokens past the prompt."""
        prefill = None
        if not resume:
            self.open(slot, len(ids) + SPARE)
            prefill = _timed(self, slot, ids)
        return prefill, [_timed(self, slot, [ids[step % len(ids)]]) for step in range(steps)]

    def answer(self, ids: Sequence[int]) -> dict[str, Any]:
        """The logits."""
        self.open("answer", len(ids) + SPARE)
        return {"logits": [float(logit) for logit in self.feed("answer", ids)]}


SPARE = 256
"""Tokens that may follow a prompt in a slot."""


def _timed(engine: Feeding, slot: str, ids: Sequence[int]) -> float:
    began = time.perf_counter()
    engine.feed(slot, ids)
    return time.perf_counter() - began


def serve(engine: Engine) -> None:
    """Answer commands until the input ends. What the engine itself prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            _say(answers, {"result": _obey(engine, json.loads(line))})
        except Exception as error:  # whatever an engine raises is a result here: it stands in the table
            traceback.print_exc()
            _say(answers, {"error": f"{type(error).__name__}: {error}"})


def _obey(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    match command.pop("command"):
        case "load":
            began = time.perf_counter()
            engine.load(**command)
            return {"seconds": time.perf_counter() - began}
        case "run":
            prefill, steps = engine.run(**command)
            return {"prefill": prefill, "steps": steps}
        case "answer":
            return engine.answer(**command)
        case "kv_bytes":
            return {"kv_bytes": engine.kv_bytes(**command)}
        case unknown:
            raise ValueError(f"no such command: {unknown}")


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
