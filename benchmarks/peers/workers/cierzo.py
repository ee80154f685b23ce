"""Cierzo through its public API. Every slot is a session of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.workers.protocol import Feeding, Logits, serve
from runtime import Session, load


class Cierzo(Feeding):
    """A bundle."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._spare: list[Session] = []
        self._path, self._threads = "", 0

    def load(self, path: str, threads: int, settings: Mapping[str, Any]) -> None:
        """Open the first session."""
        del settings
        self._path, self._threads = path, threads
        self._spare.append(self._session())

    def open(self, slot: str, capacity: int) -> None:
        """A session needs no more room for a longer text."""
        del capacity
        if slot not in self._sessions:
            self._sessions[slot] = self._spare.pop() if self._spare else self._session()
        self._sessions[slot].reset()

    def feed(self, slot: str, ids: Sequence[int]) -> Logits:
        """As Feeding.feed."""
        logits_BV = self._sessions[slot].forward_last(np.asarray(ids, dtype=np.int64))
        return np.asarray(logits_BV[0], dtype=np.float32)

    def kv_bytes(self, slot: str, tokens: int) -> int | None:
        """The same for every length."""
        del tokens
        return self._sessions[slot].kv_bytes

    def _session(self) -> Session:
        return load(self._path, threads=self._threads)


if __name__ == "__main__":
    serve(Cierzo())
