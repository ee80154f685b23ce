"""RollingKVWrite: puts a chunk's keys or values into their ring slots.

The design is that of a rolling buffer cache (Jiang et al. 2023, arXiv:2310.06825): position p lives in slot p mod S.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes, static


def _body(attributes: Attributes) -> str:
    """Padding writes back what its slot holds, so that the write has a static shape and still changes nothing.

    ScatterElements, not TensorScatter: every backend's parser takes it, and ONNX Runtime runs it in place.
    """
    return """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_1 = Constant <value_ints = [1]> ()
    axes_1_3 = Constant <value_ints = [1, 3]> ()
    tokens_1 = Shape <start = 2, end = 3> (new_BGTD)
    tokens = Squeeze (tokens_1)
    slots_1 = Shape <start = 2, end = 3> (ring_BGSD)
    offset_T = Range (zero, tokens, one)
    start_B1 = Unsqueeze (start_B, axis_1)
    position_BT = Add (start_B1, offset_T)
    slot_BT = Mod (position_BT, slots_1)
    slot_B1T1 = Unsqueeze (slot_BT, axes_1_3)
    chunk_shape = Shape (new_BGTD)
    slot_BGTD = Expand (slot_B1T1, chunk_shape)
    count_B1 = Unsqueeze (count_B, axis_1)
    valid_BT = Less (offset_T, count_B1)
    valid_B1T1 = Unsqueeze (valid_BT, axes_1_3)
    held_BGTD = GatherElements <axis = 2> (ring_BGSD, slot_BGTD)
    update_BGTD = Where (valid_B1T1, new_BGTD, held_BGTD)
    rolled_BGSD = ScatterElements <axis = 2> (ring_BGSD, slot_BGTD, update_BGTD)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Chunks that start at 0, end in the last slot, wrap, and wrap for the third time; full, partial and empty rows."""
    G, D = static(shapes[0], 1, 2), static(shapes[0], 3, 4)
    # Two sizes where the ring's is open, or slots counted modulo a constant would pass with a ring of that size.
    sizes = {static(shapes[0], 2, 7), static(shapes[0], 2, 10)}
    for S, T in sorted({(slots, tokens) for slots in sizes for tokens in (1, min(3, slots), slots)}):
        starts = np.array([0, S - T, S - 1, S, 3 * S - 1, 2**31 + 5, S + 1], np.int64)
        counts = np.array([T, T, T, T - 1, T, T, 0], np.int64)
        ring = rng.standard_normal((len(starts), G, S, D), dtype=np.float32)
        new = rng.standard_normal((len(starts), G, T, D), dtype=np.float32)
        yield ring, new, starts, counts


ROLLING_KV_WRITE = PluginOp(
    name="RollingKVWrite",
    inputs=("ring_BGSD", "new_BGTD", "start_B", "count_B"),
    outputs=("rolled_BGSD",),
    attributes={},
    body=_body,
    examples=_examples,
)
"""ring [B, G, S, D], new [B, G, T, D] with T ≤ S, start and count int64 [B] to the ring after the write.

Token t of row b has position start[b] + t and goes to slot (start[b] + t) mod S if t < count[b]; other slots stay.
A runtime binds ring and result to one buffer.
"""
