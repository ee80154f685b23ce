"""Faults in a pass: a rule that matches rightly and rewrites wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from graph_passes import pipeline
from graph_passes.driver_types import Match, Rule


@contextmanager
def planted_pass(name: str, change: Callable[[Match], Match]) -> Iterator[None]:
    """A pipeline whose rule `name` matches rightly and then rewrites wrongly."""

    def wrong(rule: Rule) -> Rule:
        return replace(rule, match=lambda model, anchor: change(rule.match(model, anchor)))

    passes = tuple((wrong(rule) if rule.name == name else rule, reason) for rule, reason in pipeline.PIPELINE)
    with mock.patch.object(pipeline, "PIPELINE", passes):
        yield


def wider(match: Match) -> Match:
    return replace(match, attributes={**match.attributes, "window": int(match.attributes["window"]) + 1})


def interleaved(match: Match) -> Match:
    return replace(match, attributes={**match.attributes, "interleaved": 1})
