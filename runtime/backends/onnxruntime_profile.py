"""Reads the profile that ONNX Runtime writes: a list of events in the format of Chrome's trace viewer.

An event has a name, `ts` and `dur` in whole microseconds, and args. A run of the graph is an event `model_run`. What a
node computed is one of category Node, with the node's name and `_kernel_time` behind it. Where a function body was put
in the place of its node, ONNX Runtime names its nodes `_inlfunc_`, the function, and their names in the body.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.profile import NodeRun, StepRun

_COMPUTED = "_kernel_time"
_INLINED = re.compile(r"_inlfunc_([A-Za-z0-9]+)")

Event = Mapping[str, Any]


def read_profile(file: Path) -> tuple[StepRun, ...]:
    """The steps of a session's life in the order in which they ran."""
    events = [event for event in json.loads(file.read_text(encoding="utf-8")) if "dur" in event]
    runs = sorted((event for event in events if event["name"] == "model_run"), key=_begin)
    nodes = sorted(
        (event for event in events if event.get("cat") == "Node" and event["name"].endswith(_COMPUTED)), key=_begin
    )
    steps, index = [], 0
    for run in runs:
        end = run["ts"] + run["dur"]
        first = index
        while index < len(nodes) and nodes[index]["ts"] <= end:
            index += 1
        steps.append(StepRun(run["dur"] * 1e-6, tuple(_outermost(nodes[first:index]))))
    return tuple(steps)


def _begin(event: Event) -> tuple[int, int]:
    return event["ts"], -event["dur"]


def _outermost(events: list[Event]) -> Iterator[NodeRun]:
    """The nodes, without those that another node runs: the time of a Loop holds that of its body."""
    end = -1
    for event in events:
        if event["ts"] + event["dur"] <= end and event["ts"] < end:
            continue
        end = max(end, event["ts"] + event["dur"])
        name = event["name"].removesuffix(_COMPUTED)
        inlined = _INLINED.match(name)
        plugin = None if inlined is None else inlined.group(1)
        yield NodeRun(name, str(event["args"]["op_name"]), plugin, event["dur"] * 1e-6)
