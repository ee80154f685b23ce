"""What a kind of engine is: the options of `build` that it has, and what builds it.

Adding one takes a module in this folder with a `KIND`, and a line in the table of `exporter/build/build.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.bundle import Bundle
    from runtime.engine_info import EngineInfo
    from runtime.step_engine_info import StepEngineInfo

Progress = Callable[[str, int, int], None]

Placements = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Graph -> provider -> op -> nodes."""

OPTIONS = ("flavor", "compute_capability", "arithmetic", "kv", "plugins", "weights")
"""Options of `build` that a kind of engine may have or not."""


class Built(Protocol):
    """What a build made."""

    @property
    def folder(self) -> Path:
        """Of the engine, in its bundle."""
        ...

    @property
    def info(self) -> EngineInfo | StepEngineInfo:
        """What its engine.json says."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What `cierzo build --json` prints."""
        ...

    def draw(self) -> Table:
        """What a step runs."""
        ...

    def written(self) -> str:
        """What lies in the folder, for a person: how large, and where its weights come from."""
        ...


@dataclass(frozen=True, slots=True)
class EngineKind:
    """options: those of OPTIONS that engines of this kind have.

    build: called with the open bundle, the keywords backend and progress, and those of `options` that were given.
    place: called with the open bundle and an arithmetic or None; gives the arithmetic and where the nodes of such an
    engine would run. None where only the library that builds knows.
    """

    options: Collection[str]
    build: Callable[..., Built]
    place: Callable[[Bundle, str | None], tuple[str, Placements]] | None = None
