"""SlidingWindowAttention: grouped-query attention over a ring, with the window as an attribute and no mask.

Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825. Token i sees token j when 0 ≤ i − j < W:
the current token counts, as in Hugging Face's `sliding_window`. (The `left_window_size` of ONNX Attention-25 does not
count it and would be W − 1.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes

FULL = 0
"""The window attribute of full causal attention."""


def _body(attributes: Attributes) -> str:
    """Slot j holds position last − ((last − j) mod S), the newest one that falls on it; negative means empty."""
    return """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_1 = Constant <value_ints = [1]> ()
    axes_1_2 = Constant <value_ints = [1, 2]> ()
    axes_1_3 = Constant <value_ints = [1, 3]> ()
    window = Constant <value_int: int = @window> ()
    tokens_1 = Shape <start = 2, end = 3> (query_BHTD)
    tokens = Squeeze (tokens_1)
    slots_1 = Shape <start = 2, end = 3> (key_BGSD)
    slots = Squeeze (slots_1)
    offset_T = Range (zero, tokens, one)
    slot_S = Range (zero, slots, one)
    start_B1 = Unsqueeze (start_B, axis_1)
    count_B1 = Unsqueeze (count_B, axis_1)
    query_position_BT = Add (start_B1, offset_T)
    end_B1 = Add (start_B1, count_B1)
    last_B1 = Sub (end_B1, one)
    behind_BS = Sub (last_B1, slot_S)
    age_BS = Mod (behind_BS, slots)
    key_position_BS = Sub (last_B1, age_BS)
    query_B1T1 = Unsqueeze (query_position_BT, axes_1_3)
    key_B11S = Unsqueeze (key_position_BS, axes_1_2)
    distance_B1TS = Sub (query_B1T1, key_B11S)
    written = GreaterOrEqual (key_B11S, zero)
    causal = GreaterOrEqual (distance_B1TS, zero)
    near = Less (distance_B1TS, window)
    unlimited = LessOrEqual (window, zero)
    inside = Or (near, unlimited)
    causal_inside = And (causal, inside)
    visible_B1TS = And (written, causal_inside)
    attended_BHTD = Attention <scale: float = @scale> (query_BHTD, key_BGSD, value_BGSD, visible_B1TS)
    """


def visible_pairs(
    start_B: npt.NDArray[np.int64], count_B: npt.NDArray[np.int64], tokens: int, slots: int, window: int
) -> npt.NDArray[np.bool_]:
    """The mask that the op stands for, bool [B, 1, T, S]: the definition that mask subgraphs are compared with."""
    last_B1 = (start_B + count_B - 1)[:, None]
    key_position_BS = last_B1 - (last_B1 - np.arange(slots)) % slots
    distance = (start_B[:, None] + np.arange(tokens))[:, None, :, None] - key_position_BS[:, None, None, :]
    visible = (key_position_BS >= 0)[:, None, None, :] & (distance >= 0)
    if window != FULL:
        visible &= distance < window
    return np.asarray(visible)


def boundary_rows(window: int, tokens: int, slots: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows (start, count) at every border: empty ring, W − 1, W, W + 1, ring full, ring wrapped, partly padded, 2³¹."""
    borders = {0, 1, window - 1, window, window + 1, slots - tokens, slots - 1, slots, slots + 1, 3 * slots + 2}
    borders.add(2**31 + 5)
    starts = sorted(border for border in borders if border >= 0)
    rows = [(start, tokens) for start in starts] + [(start, max(1, tokens - 1)) for start in starts]
    return np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows], np.int64)


def example_rows(window: int) -> Iterator[tuple[int, int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Rows at every border, two at a time: tokens T, slots S of a ring that holds them, start [2] and count [2].

    Two, since one row alone could lend its positions to others; more would be too large for a window of 32,768. An odd
    last one goes with the first.
    """
    for tokens in (1, 2, 5):
        slots = max(window, 4) + tokens - 1
        start, count = boundary_rows(window, tokens, slots)
        if window == FULL:  # a full-attention buffer is never wrapped
            inside = start + tokens <= slots
            start, count = start[inside], count[inside]
        each = [(start[[row]], count[[row]]) for row in range(len(start))]
        seen = [visible_pairs(*row, tokens, slots, window).any(axis=-1).all() for row in each]
        rows = np.flatnonzero(seen)  # without padding that sees no key: its output is unspecified
        for pair in np.resize(rows, (-(-len(rows) // 2), 2)):
            yield tokens, slots, start[pair], count[pair]


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Two query heads on one small key head: the sizes do not enter the arithmetic of positions. T = 1, 2 and 5."""
    for tokens, slots, start, count in example_rows(int(attributes["window"])):
        query = rng.standard_normal((2, 2, tokens, 4), dtype=np.float32)
        key, value = rng.standard_normal((2, 2, 1, slots, 4), dtype=np.float32)
        yield query, key, value, start, count


SLIDING_WINDOW_ATTENTION = PluginOp(
    name="SlidingWindowAttention",
    inputs=("query_BHTD", "key_BGSD", "value_BGSD", "start_B", "count_B"),
    outputs=("attended_BHTD",),
    attributes={"scale": "float", "window": "int"},
    body=_body,
    examples=_examples,
)
"""query [B, H, T, D], key and value rings [B, G, S, D] after this step's write, start and count int64 [B].

window: W ≥ 1, or 0 for full causal attention. Exact when S ≥ W + T − 1 (or S ≥ start + count when full).
"""
