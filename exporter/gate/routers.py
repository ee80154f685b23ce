"""Where a router is undecided, and what it costs when an engine decides it otherwise.

A rounded router logit may fall to the other side of one that is nearly as large. From that token on engine and truth
compute different functions, and neither is at fault; so beyond the first such token of a row the budget is not what
rounding costs but what taking the other expert costs. That is measured: the truth is computed once more with every
undecided token sent to the expert that it nearly went to.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reference.model import ContextLayer

ERRORS = 4.0
"""A router is undecided where its last chosen logit lies less than so many typical errors above the first one left out.

Typical is the median error of the reference's router logits in the engine's type. Two logits err by twice that between
them; where engines were seen to take another expert, they lay within 0.9 of it.
"""


class RouterLog:
    """Keeps every router's logits of a run of the reference: [layer][row] -> float64 [N, E]."""

    def __init__(self) -> None:
        self.logits: dict[int, list[NDArray[np.float64]]] = {}

    def __call__(self, index: int, layer: ContextLayer) -> None:
        """Listen to a layer (`Oracle.logits`' on_layer)."""
        rows = self.logits.setdefault(index, [])

        def note(_module: nn.Module, _inputs: object, logits_NE: Tensor) -> None:
            rows.append(logits_NE.double().numpy().copy())

        if layer.is_moe:
            layer.moe.router.register_forward_hook(note)


@dataclass(frozen=True, slots=True)
class Undecided:
    """margins: by layer, how close two router logits must be to count as undecided. tokens: for each row those of which
    some router is undecided. first: for each row the first of them, or its length."""

    margins: tuple[float, ...]
    tokens: tuple[frozenset[int], ...]
    first: tuple[int, ...]


def undecided(truth: RouterLog, rounded: RouterLog, top_k: int, lengths: Sequence[int]) -> Undecided:
    """From the router logits of the reference in float64 and in the engine's type."""
    margins: list[float] = []
    tokens: list[set[int]] = [set() for _ in lengths]
    for index, rows in sorted(truth.logits.items()):
        errors = [np.abs(a - b).max(axis=-1) for a, b in zip(rounded.logits[index], rows, strict=True)]
        margin = ERRORS * float(np.median(np.concatenate(errors))) if errors else 0.0
        margins.append(margin)
        for found, logits_NE in zip(tokens, rows, strict=False):
            if top_k < logits_NE.shape[-1]:
                found |= set(np.flatnonzero(_gaps(logits_NE, top_k) < margin).tolist())
    first = [min(found, default=length) for found, length in zip(tokens, lengths, strict=True)]
    return Undecided(tuple(margins), tuple(map(frozenset, tokens)), tuple(first))


def first_undecided(truth_TE: NDArray[np.float64], rounded_TE: NDArray[np.float64], top_k: int) -> int:
    """The first token of which one router is undecided, or how many there are; its logits [T, E] as in `undecided`."""
    if top_k >= truth_TE.shape[-1]:
        return len(truth_TE)
    margin = ERRORS * float(np.median(np.abs(rounded_TE - truth_TE).max(axis=-1)))
    near = np.flatnonzero(_gaps(truth_TE, top_k) < margin)
    return int(near[0]) if len(near) else len(truth_TE)


def _gaps(logits_NE: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    ordered = -np.sort(-logits_NE, axis=-1)
    gaps: NDArray[np.float64] = ordered[:, top_k - 1] - ordered[:, top_k]
    return gaps


class RouterSwap:
    """Sends every undecided token to the expert that it nearly went to, instead of the last one chosen."""

    def __init__(self, margins: Sequence[float], top_k: int) -> None:
        self._margins, self._top_k = margins, top_k

    def __call__(self, index: int, layer: ContextLayer) -> None:
        """Change a layer (`Oracle.logits`' on_layer)."""
        if not layer.is_moe or self._top_k >= layer.moe.router.out_features:
            return
        margin, k = self._margins[index], self._top_k

        def swap(_module: nn.Module, _inputs: object, logits_NE: Tensor) -> Tensor:
            order = torch.sort(logits_NE, dim=-1, descending=True, stable=True)
            last, next_one = order.indices[:, k - 1], order.indices[:, k]
            near = order.values[:, k - 1] - order.values[:, k] < margin
            token = torch.arange(len(logits_NE))[near]
            swapped = logits_NE.clone()
            swapped[token, last[near]] = logits_NE[token, next_one[near]]
            swapped[token, next_one[near]] = logits_NE[token, last[near]]
            return swapped

        layer.moe.router.register_forward_hook(swap)
