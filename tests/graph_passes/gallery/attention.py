"""What the spellings of attention share: inputs, positions of ring slots, the mask, and a repeat of heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from graph_passes.canonical import canonicalise
from tests.graph_passes.gallery.tracing import trace

Program = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From query, key, value, start and count to the result."""

WINDOW = 5
LOWEST = torch.finfo(torch.float32).min

INPUTS: Mapping[str, tuple[str | int, ...]] = {
    "query": ("B", 4, "T", 6),
    "key": ("B", 2, "S", 6),
    "value": ("B", 2, "S", 6),
    "start": ("B",),
    "count": ("B",),
}


SPELLINGS: dict[str, tuple[Program, float, int]] = {}
"""Name to program, scale and window of what is one attention node."""


def spelling(name: str, scale: float = 0.4, window: int = WINDOW) -> Callable[[Program], Program]:
    """Adds a program to the gallery under `name`."""

    def add(program: Program) -> Program:
        assert name not in SPELLINGS
        SPELLINGS[name] = (program, scale, window)
        return program

    return add


def trace_each(programs: Mapping[str, Program]) -> dict[str, ir.Model]:
    """The canonical graph of each program, from one trace of all: most of a trace's time is spent once."""
    outputs = [f"attended_{number}" for number in range(len(programs))]

    def everything(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(program(*tensors) for program in programs.values())

    traced = trace(everything, INPUTS, outputs, ("start", "count"))
    made = {}
    for name, output in zip(programs, traced.graph.outputs, strict=True):
        graph = ir.convenience.extract(traced.graph, list(traced.graph.inputs), [output])
        graph.outputs[0].name = "attended"
        made[name] = ir.Model(graph, ir_version=traced.ir_version)
        canonicalise(made[name])
    return made


def positions(query: Tensor, start: Tensor) -> Tensor:
    """Position of each token, [B, T]."""
    return start[:, None] + torch.arange(query.shape[2])[None]


def held_positions(key: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Position that each slot of the ring holds, [B, S]; negative where it is empty."""
    slots = key.shape[2]
    last = (start + count - 1)[:, None]
    return last - torch.remainder(last - torch.arange(slots)[None], torch.full((1,), slots))


def visible(query: Tensor, key: Tensor, start: Tensor, count: Tensor, window: int | None = WINDOW) -> Tensor:
    """Which token sees which slot, bool [B, 1, T, S]."""
    at, held = positions(query, start)[:, None, :, None], held_positions(key, start, count)[:, None, None, :]
    seen = (held >= 0) & (held <= at)
    return seen if window is None else seen & (at - held < window)


def expand_heads(x: Tensor) -> Tensor:
    """Two heads to four, each beside itself, as transformers does it."""
    B, G, S, D = x.shape
    return x[:, :, None].expand(B, G, 4 // G, S, D).reshape(B, 4, S, D)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Scores [B, H, T, S] without scale."""
    return q @ expand_heads(k).transpose(2, 3)


def mixed(masked: Tensor, v: Tensor) -> Tensor:
    """Softmax and the product with the values."""
    return torch.softmax(masked, -1) @ expand_heads(v)
