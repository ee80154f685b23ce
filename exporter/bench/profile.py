"""Where the time of a decode step and of a prefill chunk goes, by plugin op, and for the rest by operator.

ONNX Runtime's profile has every node. A plugin op shows as one node where a kernel of ours runs it, and otherwise as
the nodes of its function body, which carry its name.

Letters: B batch rows, C chunk.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence

from exporter.bench.contexts import position_limit
from exporter.bench.graph_cost import GraphCost, LinearCost
from exporter.bench.report import Profile, ProfileRow
from exporter.bench.rounds import Counted, Text, counted_since, warm_up
from runtime import Session
from runtime.chunking import Int64Array
from runtime.kernels import counters
from runtime.profile import NodeRun, StepRun

KERNEL, BODY, OPERATOR = "kernel", "body", "op"
_CHUNKS = 4
"""Chunks that are fed to be profiled; the last one is left out, since it also gives out logits."""

Key = tuple[str, str]
"""Name of an op, and KERNEL, BODY or OPERATOR."""


def profiles(
    load_profiled: Callable[[str], Session],
    text: Text,
    cost: GraphCost,
    *,
    context: int,
    decode_tokens: int,
    batch: int,
) -> dict[str, Profile]:
    """Profile prefill chunks after `context` tokens, or as many as there is room for, and single tokens after them.

    load_profiled: loads the bundle with its profile in the folder that it gets.
    """
    with tempfile.TemporaryDirectory(prefix="cierzo-bench-") as folder:
        session = load_profiled(folder)
        warm_up(session, text)
        kv = session.manifest.kv
        limit = position_limit(kv)
        width = min(kv.chunk, max(1, limit // 2))
        count = min(decode_tokens, limit - width)
        chunks = min(_CHUNKS, (limit - count) // width) if width == kv.chunk else 1
        context = min(context, limit - count - chunks * width)
        if context:
            session.forward_last(text.at(0, context))
        reading = _fed(session, [text.at(context, chunks * width)], steps=chunks)
        start = context + chunks * width
        decoding = _fed(session, [text.at(start + index, 1) for index in range(count)], steps=count)
        steps = session.end_profile()
    # Whatever was fed before, these are the last steps.
    chunk_steps, token_steps = steps[-count - chunks : -count], steps[-count:]
    logits = batch
    if chunks > 1:
        chunk_steps, logits = chunk_steps[:-1], 0
    return {
        "decode": summed(token_steps, cost, decoding, tokens=1, context=start, batch=batch, logits=batch),
        "prefill": summed(chunk_steps, cost, reading, tokens=width, context=context, batch=batch, logits=logits),
    }


def _fed(session: Session, feeds: Sequence[Int64Array], *, steps: int) -> Mapping[str, Counted]:
    """What kernels count while the session is fed, in so many steps."""
    before = counters()
    for ids_BT in feeds:
        session.forward_last(ids_BT)
    return counted_since(before, steps=steps)


def summed(
    steps: Sequence[StepRun],
    cost: GraphCost,
    counted: Mapping[str, Counted],
    *,
    tokens: int,
    context: int,
    batch: int,
    logits: int,
) -> Profile:
    """The mean of the steps that were not slower than the median one, so that sums stay sums.

    steps: alike, at least one. counted: what kernels counted in all of them. tokens: of a step in each row. logits: of
    a step in all rows.
    """
    middle = statistics.median(step.seconds for step in steps)
    quick = [step for step in steps if step.seconds <= middle]
    times: dict[Key, float] = {}
    nodes: dict[Key, set[str]] = {}
    for step in quick:
        for node in step.nodes:
            key = key_of(node, cost.plugins)
            times[key] = times.get(key, 0.0) + 1e3 * node.seconds / len(quick)
            nodes.setdefault(key, set()).add(node.name)
    whole = 1e3 * sum(step.seconds for step in quick) / len(quick)
    rows = []
    for key in sorted(times, key=lambda key: -times[key]):
        op, kind = key
        linear = [item for item in cost.linear if belongs(item, key, nodes[key])]
        tally = counted.get(op, Counted()) if kind == KERNEL else Counted()
        read = sum(item.bytes_read(batch * tokens) for item in linear if logits or not item.head)
        if tally.bytes and (logits or not linear):  # a chunk without logits is not the mean of one with and others
            read = round(tally.bytes / tally.steps)
        operations = sum(item.operations(batch * tokens, logits) for item in linear)
        rows.append(
            ProfileRow(
                op=op,
                kind=kind,
                nodes=len(nodes[key]),
                milliseconds=times[key],
                share=times[key] / whole,
                bytes=read or None,
                operations=operations or None,
            )
        )
    return Profile(tokens, context, len(quick), whole, whole - sum(times.values()), tuple(rows))


def key_of(node: NodeRun, plugins: Mapping[str, str]) -> Key:
    """Under which name a node's time is shown. plugins: names of the graph's plugin nodes and their ops."""
    if node.name in plugins:
        return plugins[node.name], KERNEL
    if node.plugin is not None:
        return node.plugin, BODY
    return node.op, OPERATOR


def belongs(linear: LinearCost, key: Key, names: Collection[str]) -> bool:
    """Whether a linear node is among those of `key`: a plugin node by its op, another one by its name."""
    op, kind = key
    if linear.plugin:
        return kind != OPERATOR and linear.op == op
    return kind == OPERATOR and linear.node in names
