"""Sliding window: a mask that means "0 ≤ i − j < W over a ring" becomes the attribute `window`, and the mask goes.

Recognised by its meaning, not its spelling. The mask's subgraph is cut out and run: one query at the end of a long
ring counts the window, and then the whole mask must equal the definition on every border, at every power of two and
at random positions, in short and long rings, several rows at once. Any spelling may pass; what differs is refused with
the first pair of query and key that does.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.driver_types import Match, Rule
from graph_passes.graph import Refusal, data_leaves, dims, operand
from graph_passes.ops.grouped_query_attention import GROUPED_QUERY_ATTENTION
from graph_passes.ops.sliding_window_attention import FULL, SLIDING_WINDOW_ATTENTION, boundary_rows, visible_pairs
from graph_passes.region import Region

LONGEST_WINDOW = 2**20
"""Windows are looked for up to here; a mask that still shows everything is full attention."""

_MOST_PAIRS = 1 << 17
"""Pairs of query and key in one run of the mask, unless two rows have more."""


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
        """Refuses at the first pair of query and key on which mask and definition differ.

        Rings are as long as they must be, a little longer, and much longer; several rows always go together, since a
        mask may take one row's position for all.
        """
        rng = np.random.default_rng(window)
        least = max(window, 4)
        for tokens, slack in ((1, 0), (1, 7), (2, 0), (2, 7), (5, 0), (5, 7), (19, 40), (2, 1100)):
            slots = least + tokens - 1 + slack
            start, count = boundary_rows(window, tokens, slots)
            extra = rng.integers(0, 4 * slots, 3)
            self._compare(
                np.concatenate([start, extra]),
                np.concatenate([count, rng.integers(0, tokens + 1, 3)]),
                tokens,
                slots,
                window,
            )
        # What else may happen at a position, such as the end of a block, happens at powers of two or somewhere.
        starts = np.concatenate([2 ** np.arange(32), _anywhere(rng, _rows_at_once(1, least + 7))])
        self._compare(starts, np.ones_like(starts), 1, least + 7, window)

    def _compare(
        self, starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], tokens: int, slots: int, window: int
    ) -> None:
        size = _rows_at_once(tokens, slots)
        for first in range(0, len(starts), size):
            start, count = starts[first : first + size], counts[first : first + size]
            got = self(start.tolist(), count.tolist(), tokens, slots)
            want = visible_pairs(start, count, tokens, slots, window)
            if not np.array_equal(got, want):
                row, _, t, s = np.argwhere(got != want)[0].tolist()
                raise Refusal(
                    f"with start {start[row]}, count {count[row]}, T {tokens}, S {slots} and a window of {window}, "
                    f"token {t} {'sees' if got[row, 0, t, s] else 'does not see'} slot {s}",
                    self._visible.producer(),
                )


def _rows_at_once(tokens: int, slots: int) -> int:
    """As many as keep a run within a few megabytes, and at least two."""
    return min(1024, max(2, _MOST_PAIRS // (tokens * slots)))


def _anywhere(rng: np.random.Generator, number: int) -> npt.NDArray[np.int64]:
    """Positions up to 2³¹, half of them of every order of magnitude alike."""
    flat = rng.integers(0, 2**31, number)
    return np.where(np.arange(number) % 2 == 0, flat, np.exp2(rng.uniform(0, 31, number)).astype(np.int64))


RULE = Rule("sliding_window", SLIDING_WINDOW_ATTENTION, frozenset({("cierzo", GROUPED_QUERY_ATTENTION.name)}), match)
