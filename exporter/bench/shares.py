"""From seconds to rates, and to shares of what the machine can do. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exporter.bench.graph_cost import GraphCost
from exporter.bench.limits import BANDWIDTH, FLOAT_PEAK, INT8_PEAK
from exporter.bench.report import Decode, Limits, Prefill, Read, Spread, StepCost
from exporter.bench.rounds import Counted

_READS_KV = "RollingAttention"
"""Ops whose names begin so count bytes of KV buffers, the others bytes of weights."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of a reading or a step, in float32 and in 8-bit numbers."""

    floats: int
    int8s: int


def limits_of(rates: Mapping[str, Sequence[float]]) -> Limits:
    """The limits as they were measured; `rates` has at least the two that every machine has."""
    int8 = rates.get(INT8_PEAK)
    return Limits(Spread.of(rates[BANDWIDTH]), Spread.of(rates[FLOAT_PEAK]), Spread.of(int8) if int8 else None)


def work(cost: GraphCost, *, tokens: int, logits: int) -> Work:
    """What `tokens` tokens take of which `logits` are followed by logits, all rows together."""
    return Work(*(cost.operations(tokens, logits, quantized=quantized) for quantized in (False, True)))


def share_of_peak(done: Work, elapsed: float, limits: Limits) -> float | None:
    """Of the time `elapsed`, what the same work would take at the peaks; None where a peak that it needs is unknown."""
    if done.int8s and limits.int8_operations is None:
        return None
    ideal = done.floats / limits.float_operations.median
    if limits.int8_operations is not None:
        ideal += done.int8s / limits.int8_operations.median
    return ideal / elapsed


def prefill_of(readings: Sequence[tuple[int, float]], cost: GraphCost, limits: Limits, *, batch: int) -> Prefill:
    """readings: tokens of each row and seconds, the same tokens every time."""
    tokens, elapsed = readings[0][0], Spread.of([elapsed for _, elapsed in readings])
    done = work(cost, tokens=batch * tokens, logits=batch)
    return Prefill(tokens, elapsed, batch * tokens / elapsed.median, share_of_peak(done, elapsed.median, limits))


def decode_of(groups: Sequence[Sequence[float]], weight_bytes: int, limits: Limits, *, batch: int) -> Decode:
    """groups: seconds of the single-token steps of each group."""
    rates = Spread.of([batch * len(group) / sum(group) for group in groups])
    bytes_per_second = weight_bytes * rates.median / batch
    return Decode(
        rates,
        1e3 * statistics.median(elapsed for group in groups for elapsed in group),
        bytes_per_second / limits.read_bandwidth.median,
    )


def step_cost(cost: GraphCost, counted: Mapping[str, Counted], *, batch: int) -> StepCost:
    """Of a decode step. counted: what kernels counted in decode steps, by op; it goes before what is worked out."""
    reads = []
    for op in dict.fromkeys(linear.op for linear in cost.linear):
        nodes = [linear for linear in cost.linear if linear.op == op]
        tally = counted.get(op, Counted())
        if tally.bytes:
            reads.append(Read(op, len(nodes), round(tally.bytes / tally.steps), counted=True))
        else:
            reads.append(Read(op, len(nodes), sum(linear.bytes_read(batch) for linear in nodes), counted=False))
    kv = [tally for op, tally in counted.items() if op.startswith(_READS_KV) and tally.bytes]
    token, logits = work(cost, tokens=1, logits=0), work(cost, tokens=0, logits=1)
    return StepCost(
        weight_bytes=sum(read.bytes for read in reads),
        reads=tuple(reads),
        kv_bytes_read=round(sum(tally.bytes / tally.steps for tally in kv)) if kv else None,
        float_operations=token.floats,
        int8_operations=token.int8s,
        logit_operations=logits.floats + logits.int8s,
    )
