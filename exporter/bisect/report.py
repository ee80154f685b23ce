"""What a bisection found: which pass, which layer, which node, and how a person reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from exporter.bisect.weights import WeightDifference

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first place where the bundle computes something else than the checkpoint says.

    kind: "weight", "constant", "node", "pass", "kernel" (the node is right where its function body runs), "tracer" or
        "whole" (no node is off by itself).
    stage: the pass that made the node, "trace" or "canonicalise" for what comes before the passes; None when no pass
        had a hand in it. reproduced: whether this version makes the same fault again; None where that is no question.
    layer: i of `layers.i`, None outside the layers. module: path of the innermost module. node, op: of the node.
    value: what the node gives out. error: relative to the largest magnitude of it; None when not finite.
    step: number of the rolling step that shows it first. weight: the parameter or constant, for these kinds.
    why: one or two sentences. others: further values that are off by themselves, in the order of the graph.
    """

    kind: str
    stage: str | None
    reproduced: bool | None
    layer: int | None
    module: str
    node: str
    op: str
    value: str
    error: float | None
    step: int
    weight: str | None
    why: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BisectReport:
    """The outcome. culprit: None for a healthy bundle. folder: where the smallest failing model is, if there is one.

    nodes: how many were held against golden by themselves; nodes_written: how many the smallest model has.
    confirmed: whether the model that was written fails when Polygraphy runs it from its files.
    """

    bundle: str
    checkpoint: str
    culprit: Culprit | None
    weights: tuple[WeightDifference, ...]
    nodes: int
    steps: int
    folder: str | None = None
    nodes_written: int = 0
    confirmed: bool | None = None

    @property
    def healthy(self) -> bool:
        """Nothing was found."""
        return self.culprit is None

    def to_json(self) -> dict[str, Any]:
        """Plain data; a difference that is not finite becomes null."""
        return {
            "healthy": self.healthy,
            "bundle": self.bundle,
            "checkpoint": self.checkpoint,
            "culprit": None if self.culprit is None else asdict(self.culprit) | {"others": list(self.culprit.others)},
            "weights": [
                asdict(weight) | {"largest": weight.largest if weight.largest < float("inf") else None}
                for weight in self.weights
            ],
            "values_compared": self.nodes,
            "steps": self.steps,
            "folder": self.folder,
            "nodes_written": self.nodes_written,
            "confirmed": self.confirmed,
        }


def render_bisect(report: BisectReport, console: Console) -> None:
    """Pass, layer and node as a small table, then why, and where the model is."""
    from rich.table import Table
    from rich.text import Text

    culprit = report.culprit
    if culprit is None:
        console.print(
            f"[bold green]Nothing to bisect[/]: the weights are the checkpoint's, {report.nodes:,} values agree node "
            f"by node over {report.steps} steps, and every module is within its budget.",
            highlight=False,
        )
        return
    table = Table(title="Culprit", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    reproduced = {True: ", and this version's does it again", False: ", but this version's does not", None: ""}
    rows = {
        "pass": (culprit.stage or "none") + (reproduced[culprit.reproduced] if culprit.stage else ""),
        "layer": "none" if culprit.layer is None else str(culprit.layer),
        "module": culprit.module or "the model itself",
        "node": f"{culprit.op} {culprit.node}",
        "value": culprit.value,
    }
    if culprit.weight is not None:
        rows[culprit.kind] = culprit.weight
    rows["error"] = "not finite, or another shape or integer" if culprit.error is None else f"{culprit.error:.1e}"
    rows["first seen"] = f"in step {culprit.step}"
    for name, text in rows.items():
        table.add_row(name, Text(text))
    console.print(table)
    console.print(Text(culprit.why))
    if culprit.others:
        more = f" and {len(culprit.others) - 3} more" if len(culprit.others) > 3 else ""
        console.print(Text(f"Off by themselves as well: {', '.join(culprit.others[:3])}{more}."))
    if report.folder is not None:
        nodes = "1 node" if report.nodes_written == 1 else f"{report.nodes_written} nodes"
        console.print(
            Text(f"The smallest failing model ({nodes}) is in {report.folder}; README.txt says how to run it.")
        )
