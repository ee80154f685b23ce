"""Keeps what went wrong in a plugin until somebody can be told.

TensorRT calls plugins through C++, and what a callback raises ends there: of most callbacks the library reports only
that one failed, of some it takes no notice, and two end the process (docs/tensorrt.md has the list). So whoever calls
the library asks here afterwards.
"""

from __future__ import annotations

import threading

from runtime.errors import BackendError, CierzoError


class Failures:
    """The first failure since the last time that somebody asked; later ones mostly follow from it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: tuple[str, BaseException] | None = None

    def note(self, where: str, error: BaseException) -> None:
        """Keep what a callback of the plugin node `where` was about to raise."""
        with self._lock:
            if self._first is None:
                self._first = (where, error)

    def raise_first(self) -> None:
        """Raise what was kept, and forget it; returns if there is nothing.

        Raises BackendError that says which node it was; an exception that is no failure at all, such as
        KeyboardInterrupt, is raised as it was.
        """
        with self._lock:
            found, self._first = self._first, None
        if found is None:
            return
        where, error = found
        if not isinstance(error, Exception):
            raise error
        if isinstance(error, CierzoError):
            raise BackendError(f"{where}: {error}") from error
        raise BackendError(
            f"{where} failed with {type(error).__name__}: {error}. This is a fault of Cierzo's plugin; an engine "
            "that is built with `--plugins none` does without it."
        ) from error
