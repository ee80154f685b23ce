"""A single token over a ring of exactly the window: it sees all that the ring holds, and so needs no mask.

The ring is a rolling buffer cache (Jiang et al. 2023, arXiv:2310.06825): position p lies in slot p mod W. Attention
does not ask in which order keys lie.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.lower.ort.attention_nodes import AttentionNode
from graph_passes.lower.ort.full_attention import attend, write
from graph_passes.lower.ort.step import Step

_INT64 = ir.DataType.INT64


class RingDecode:
    """What the layers of one window share in a step of one token: the slot that it goes to, and how many it sees."""

    def __init__(self, step: Step, window: int) -> None:
        self._step, self._window = step, window
        nodes, name = step.nodes, f"attention.window_{window}"
        slots = nodes.integers(window)
        self._slot_B = nodes.one("Mod", [step.start_B, slots], f"{name}.slot", _INT64, [step.batch])
        self._seen_B = nodes.one("Min", [step.reached_B, slots], f"{name}.seen", _INT64, [step.batch])

    def attend(
        self, layer: AttentionNode, turned: tuple[ir.Value, ir.Value, ir.Value]
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """Attended [B, 1, H·D], and the rings [B, W, G·D] of keys and values after the write.

        A row that has no token in the step writes into the slot of position start − W, which none of its tokens to
        come sees.
        """
        query, key, value = turned
        present = write(self._step, layer, (key, value), self._slot_B, self._window, mode="circular")
        return attend(self._step, layer, query, present, self._seen_B), present
