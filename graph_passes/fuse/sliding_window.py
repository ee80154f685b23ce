"""Sliding window: a mask that means "0 ≤ i − j < W over a ring" becomes the attribute `window`, and the mask goes.

Recognised by its meaning, not its spelling. The mask's subgraph is cut out and run: one query at the end of a long
ring counts the window, and then the whole mask must equal the definition on every border and at random rows. Any
spelling that passes is the same function of (start, count), and any other is refused with the first pair that differs.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import Refusal, data_leaves, dims, operand
from graph_passes.ops.grouped_query_attention import GROUPED_QUERY_ATTENTION
from graph_passes.ops.sliding_window_attention import FULL, SLIDING_WINDOW_ATTENTION, boundary_rows, visible_pairs
from graph_passes.region import Region

LONGEST_WINDOW = 2**20
"""Windows are looked for up to here; a mask that still shows everything is full attention."""


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the GroupedQueryAttention node: its mask, read as a window over a ring."""
    query, key, value, visible = (operand(anchor, i) for i in range(4))
    leaves = data_leaves(visible)
    vectors = [v for v in leaves if v.dtype == ir.DataType.INT64 and len(dims(v)) == 1]
    if len(leaves) != 2 or len(vectors) != 2:
        names = ", ".join(repr(leaf.name) for leaf in leaves) or "nothing"
        raise Refusal(f"the mask should depend on two int64 [B] values, but depends on {names}", visible.producer())
    reasons = []
    for start, count in itertools.permutations(vectors):
        try:
            mask = _Mask(model, visible, start, count)
            window = mask.read_window()
            mask.confirm(window)
        except Refusal as refusal:
            reasons.append(f"read as start={start.name}, count={count.name}: {refusal.reason}")
            continue
        scale = float(anchor.attributes["scale"].as_float())
        return Match(
            "sliding_window",
            SLIDING_WINDOW_ATTENTION,
            anchor,
            (query, key, value, start, count),
            {"scale": scale, "window": window},
            (anchor.outputs[0],),
        )
    raise Refusal("the mask is no causal window over a ring (" + "; ".join(reasons) + ")", visible.producer())


class _Mask:
    """The mask's subgraph as a function of start, count, T and S."""

    def __init__(self, model: ir.Model, visible: ir.Value, start: ir.Value, count: ir.Value) -> None:
        # Whichever value the mask asks for T and S, it finds these symbols there.
        self._tokens_dim, self._slots_dim = dims(visible)[2], dims(visible)[3]
        self._region = Region(model, [start, count], [visible])
        self._visible = visible

    def __call__(self, start: list[int], count: list[int], tokens: int, slots: int) -> np.ndarray:
        arrays = [np.array(start, np.int64), np.array(count, np.int64)]
        extents = {str(self._tokens_dim): tokens, str(self._slots_dim): slots}
        (mask,) = self._region.run(arrays, extents)
        if mask.shape != (len(start), 1, tokens, slots):
            raise Refusal(f"the mask has shape {mask.shape} for T = {tokens}, S = {slots}", self._visible.producer())
        return np.asarray(mask)

    def read_window(self) -> int:
        """How many keys the newest token sees in a full ring that is longer than that."""
        slots = 64
        while slots <= 2 * LONGEST_WINDOW:
            seen = int(self([slots - 1], [1], 1, slots).sum())
            if seen < slots:
                return seen
            slots *= 8
        return FULL

    def confirm(self, window: int) -> None:
        """Refuses at the first pair of query and key on which mask and definition differ."""
        rng = np.random.default_rng(window)
        for tokens in (1, 2, 5):
            for slots in {max(window, 4) + tokens - 1, max(window, 4) + tokens + 6}:
                starts, counts = boundary_rows(window, tokens, slots)
                extra = rng.integers(0, 4 * slots, 3)
                starts = np.concatenate([starts, extra])
                counts = np.concatenate([counts, rng.integers(0, tokens + 1, 3)])
                for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
                    got = self([start], [count], tokens, slots)
                    want = visible_pairs(np.array([start]), np.array([count]), tokens, slots, window)
                    if not np.array_equal(got, want):
                        _, _, t, s = np.argwhere(got != want)[0].tolist()
                        raise Refusal(
                            f"with start {start}, count {count}, T {tokens}, S {slots} and a window of {window}, "
                            f"token {t} {'sees' if got[0, 0, t, s] else 'does not see'} slot {s}",
                            self._visible.producer(),
                        )


RULE = Rule("sliding_window", SLIDING_WINDOW_ATTENTION, frozenset({("cierzo", GROUPED_QUERY_ATTENTION.name)}), match)
