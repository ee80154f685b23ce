"""Where the time of steps went: what `load(..., profile=folder)` and `Session.end_profile` are about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeRun:
    """One node in one step. name: as in the graph, or as the backend calls what it made of it; op: its operator.

    plugin: the plugin op whose function body the node is part of, or None.
    """

    name: str
    op: str
    plugin: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class StepRun:
    """One step: its wall time as the backend measured it, and its nodes in the order in which they began."""

    seconds: float
    nodes: tuple[NodeRun, ...]
