"""How the pipeline's report is drawn: what fused, where, how exactly, and how many nodes were left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from exporter.console import new_table


def draw_fusion(fusion: Mapping[str, Any]) -> list[Table]:
    """Two tables of a manifest's `fusion` section: plugin nodes of the whole model, and passes over the template.

    Parts that the section does not have are left out, since it may come from another version.
    """
    tables = []
    if nodes := fusion.get("nodes"):
        tables.append(_node_table(nodes))
    if passes := fusion.get("passes"):
        tables.append(_pass_table(passes, fusion.get("fusions") or ()))
    return tables


def _node_table(nodes: Mapping[str, int]) -> Table:
    table = new_table("Plugin nodes of the model")
    table.add_column("op")
    table.add_column("nodes", justify="right")
    for op, number in nodes.items():
        if number:
            table.add_row(escape(op), f"{number:,}")
    return table


def _pass_table(passes: Sequence[Mapping[str, Any]], fusions: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table("Passes over the template (one layer of each kind)")
    for column, justify in (("pass", "left"), ("fused", "right"), ("in", "left"), ("proof error", "right")):
        table.add_column(column, justify="left" if justify == "left" else "right", overflow="fold")
    table.add_column("nodes", justify="right", no_wrap=True)
    for step in passes:
        own = [fusion for fusion in fusions if fusion.get("rule") == step.get("name")]
        places = ", ".join(dict.fromkeys(str(fusion.get("scope")) for fusion in own))
        proofs = [(fusion["error"], fusion.get("precision")) for fusion in own if fusion.get("error") is not None]
        error = _proof(*max(proofs)) if proofs else "not proved" if own else ""
        nodes = f"{step.get('nodes_before')} → {step.get('nodes_after')}"
        table.add_row(escape(str(step.get("name"))), str(len(own) or ""), escape(places), error, nodes)
    return table


def _proof(error: float, precision: str | None) -> str:
    """The largest error of a pass's proofs; 0 where region and node agree in every bit."""
    figure = f"{error:.1e}" if error else "0"
    return f"{figure} in {precision}" if precision else figure
