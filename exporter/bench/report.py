"""What `cierzo bench` reports, as plain data. Rates are per second, sizes in bytes, unless a name says otherwise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """What was measured several times."""

    median: float
    least: float
    most: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples), tuple(samples))


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine reads and computes at most, measured in turn with the engine.

    read_bandwidth: bytes. float_operations: of a large float32 product. int8_operations: of 8-bit products in
    registers, None without native kernels or at a level that has no instructions for them.
    """

    read_bandwidth: Spread
    float_operations: Spread
    int8_operations: Spread | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of the process: before loading, right after it, after the first tokens, at the end, and at most.

    anonymous: of that at the end, what no file backs. None where the system does not tell. kv_bytes: the KV buffers.
    """

    before: int | None
    loaded: int | None
    ready: int | None
    end: int | None
    anonymous: int | None
    peak: int | None
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """The weights that one decode step reads in all nodes of one op; counted by its kernel, or worked out."""

    op: str
    nodes: int
    bytes: int
    counted: bool


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step must read and compute in its linear layers; see `exporter.bench.graph_cost`.

    weight_bytes: the sum of `reads`. kv_bytes_read: of KV buffers at the last context, where kernels count it.
    float_operations, int8_operations: for one token without its logits; logit_operations: for the logits.
    """

    weight_bytes: int
    reads: tuple[Read, ...]
    kv_bytes_read: int | None
    float_operations: int
    int8_operations: int
    logit_operations: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Reading a text of `tokens` tokens (in each row). share: of the time, what it would take at the matmul peaks."""

    tokens: int
    seconds: Spread
    tokens_per_second: float
    share_of_matmul_peak: float | None


@dataclass(frozen=True, slots=True)
class Decode:
    """Groups of single tokens (in each row). milliseconds: of a step, the median over all steps of all groups.

    share: of the bandwidth of memory, and so above 1 where weights come out of a cache that holds them all.
    """

    tokens_per_second: Spread
    milliseconds: float
    share_of_read_bandwidth: float


@dataclass(frozen=True, slots=True)
class AtContext:
    """Prefill of `context` tokens, and decode from there on."""

    context: int
    prefill: Prefill
    decode: Decode


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A measurement that was not made, and why, a sentence."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """All nodes of one op in a step. kind: "kernel" or "body" of a plugin op, or "op" of ONNX.

    bytes and operations: of its weights (or of KV buffers, in a kernel of attention) and products; None where unknown.
    """

    op: str
    kind: str
    nodes: int
    milliseconds: float
    share: float
    bytes: int | None
    operations: int | None


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of a step goes: the mean of the `steps` that were not slower than the median one.

    tokens: of the step, in each row. context: in the buffers before it. rows: slowest first; with
    between_milliseconds, what passes between nodes, they add up to `milliseconds`.
    """

    tokens: int
    context: int
    steps: int
    milliseconds: float
    between_milliseconds: float
    rows: tuple[ProfileRow, ...]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything that `cierzo bench` shows.

    kernels: "isa", the level of instructions, "ops", the plugin ops of the graph that native kernels run, and "reason",
    why there are none. profile: "decode" and "prefill", empty when it was not asked for.
    """

    bundle: str
    model: Mapping[str, Any]
    machine: Mapping[str, Any]
    kernels: Mapping[str, Any]
    options: Mapping[str, Any]
    limits: Limits
    load_seconds: Spread
    memory: Memory
    step: StepCost
    first_token: Prefill | None
    contexts: tuple[AtContext, ...]
    left_out: tuple[LeftOut, ...]
    profile: Mapping[str, Profile]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain
