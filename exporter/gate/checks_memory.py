"""What the KV buffers hold, whatever went through them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import onnx

from exporter.gate.feeding import Run
from exporter.validation_report import Check
from graph_passes.ops.base import DOMAIN
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8
from runtime.rolling_kv import kv_bytes

_ATTENTION = {(DOMAIN, op.name) for op in (ROLLING_ATTENTION, ROLLING_ATTENTION_INT8)}


def declared_windows(run: Run) -> Iterator[Check]:
    """What the manifest and every attention node of the bundle's graph say, against the checkpoint's windows.

    A row that is shorter than a window does not show one that is too wide; this does, at no cost.
    """
    session = run.session
    said = tuple(layer.window for layer in session.manifest.kv.layers)
    nodes = graph_windows(session.bundle.file(session.manifest.graph.file))
    wrong = [
        f"layer {index}: {_spelled(has)} for {_spelled(window)}"
        for source in (said, nodes)
        if source is not None
        for index, (has, window) in enumerate(zip_longest(source, run.windows))
        if has != window
    ]
    detail = "manifest and graph have the checkpoint's windows" if not wrong else "; ".join(wrong[:3])
    if nodes is None and not wrong:
        detail = "the manifest has the checkpoint's windows; attention is spelled out in the graph"
    yield Check("declared windows", not wrong, detail)


def graph_windows(graph: Path) -> tuple[int | None, ...] | None:
    """The attribute `window` of the graph's attention nodes, by layer; None where it has no such nodes."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    found = [
        attribute.i or None
        for node in nodes
        if (node.domain, node.op_type) in _ATTENTION
        for attribute in node.attribute
        if attribute.name == "window"
    ]
    return tuple(found) if found else None


def _spelled(window: int | None) -> str:
    return "no window" if window is None else f"window {window:,}"


def memory(run: Run) -> Iterator[Check]:
    """Bytes by the checkpoint's windows, not by what the bundle says of itself."""
    session = run.session
    model, kv, numerics = session.manifest.model, session.manifest.kv, session.numerics
    beyond = kv.chunk - 1 if numerics.window_slots is None else numerics.window_slots
    slots = sum(
        (kv.context or 0) + numerics.context_slots if window is None else window + beyond for window in run.windows
    )
    due = numerics.rings * kv_bytes(
        [slots], batch=session.batch, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=numerics.kv
    )
    held = session.kv_bytes
    detail = f"{held:,} bytes after {int(session.position.max()):,} tokens, as W + {beyond} slots in each layer make"
    yield Check("KV memory", held == due, detail if held == due else f"{held:,} bytes are held and {due:,} are due")
