"""Many tokens over a ring of exactly the window: the ring is laid out straight, attended to, and wound up again.

A step of T tokens sees W − 1 positions before its first one, and overwrites those in the ring that its last token no
longer sees. So it works on a copy, the scratch memory, which all layers use in turn:

    gather     slot j of row b takes position start − P + j of the ring, P = min(start, W − 1), for all j < L; what
               lies at j ≥ P is of no meaning and is overwritten or not seen
    attention  PagedAttention writes the step's keys and values behind these P and attends, each query to its window
    scatter    slot w of the ring takes the newest position p < start + count with p mod W = w

L = W − 1 + T at most, rounded up to whole pages, and B · L slots are pages of one cache for PagedAttention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.lower.ort.attention_nodes import AttentionNode
from graph_passes.lower.ort.nodes import MICROSOFT, Extent, extents, times
from graph_passes.lower.ort.plan import BOUNDS, PAGE
from graph_passes.lower.ort.step import Step

_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64
_METADATA_INPUT = 16


def scratch_slots(windows: list[int], chunk: int) -> int:
    """Slots of a row of the scratch memory, for steps of at most `chunk` tokens."""
    return -(-(max(windows) - 1 + chunk) // PAGE) * PAGE


class Pages:
    """The scratch memory of one graph: pages of PAGE slots, slots / PAGE of them for each row, in order."""

    def __init__(self, step: Step, slots: int) -> None:
        self.step, self.slots = step, slots
        nodes = step.nodes
        self.extent: Extent = times(step.batch, slots // PAGE)
        self.bounds = ir.Value(name=BOUNDS, type=ir.TensorType(_INT32), shape=ir.Shape([2]))
        axis = nodes.integers(0)
        ends = nodes.one("CumSum", [step.tokens_B, axis], "attention.query_ends", _INT64, [step.batch])
        more = step.batch + 1 if isinstance(step.batch, int) else ir.SymbolicDim(f"{step.batch.value}+1")
        both = nodes.one("Concat", [nodes.integers([0]), ends], "attention.queries", _INT64, [more], {"axis": 0})
        self.cumulative = nodes.cast(both, _INT32)
        pages = slots // PAGE
        first = nodes.one("Mul", [step.row_B1, nodes.integers(pages)], "attention.first_page", _INT64, [step.batch, 1])
        table = nodes.one(
            "Add", [first, nodes.integers(np.arange(pages)[None])], "attention.pages", _INT64, [step.batch, pages]
        )
        self.table = nodes.cast(table, _INT32)
        self.first_slot_B1 = nodes.one(
            "Mul", [step.row_B1, nodes.integers(slots)], "attention.first_slot", _INT64, [step.batch, 1]
        )


class RingPrefill:
    """What the layers of one window share in a step of many tokens: where everything comes from."""

    def __init__(self, pages: Pages, window: int) -> None:
        self._pages, self._window = pages, window
        self._name = f"attention.window_{window}"
        past_B = self._of_rows("Min", pages.step.start_B, window - 1, "past")
        self._past_B = pages.step.nodes.cast(past_B, _INT32)
        self._origin_B1 = self._column("Sub", pages.step.start_B, past_B, "origin")
        self._taken = self._gathered_from()
        self._kept_BW = self._wound_up_from()

    def attend(
        self, layer: AttentionNode, turned: tuple[ir.Value, ir.Value, ir.Value], before: ir.Value | None
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value], list[ir.Value]]:
        """Attended [B, T, H·D], the rings [B, W, G·D] after the step, and the scratch memory: the gathered keys and
        values, and those after PagedAttention, which must all be outputs of the graph.

        before: a zero [1] that the layer before makes when it is done with the scratch memory, see `done`.
        """
        nodes, pages, name = self._pages.step.nodes, self._pages, str(layer.attended.name)
        taken = self._taken
        if before is not None:
            taken = nodes.one("Add", [taken, before], f"{name}.taken", _INT64, extents(taken))
        straight = [self._straight(layer, past, taken) for past in layer.past]
        widths = [heads * layer.head_dim for heads in (layer.heads, layer.kv_heads, layer.kv_heads)]
        count = times(*extents(turned[0])[:2])
        rows = [self._flat(value, count, width) for value, width in zip(turned, widths, strict=True)]
        inputs: list[ir.Value | None] = [*rows, *straight, pages.cumulative, self._past_B, pages.table]
        inputs += [None] * (_METADATA_INPUT - len(inputs))
        attributes = {
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "local_window_size": self._window,
            "scale": layer.scale,
        }
        outputs = [
            (f"{name}.attended.flat", layer.dtype, extents(rows[0])),
            *((f"{past.name}.written", layer.dtype, extents(straight[0])) for past in layer.past),
        ]
        made = nodes.several("PagedAttention", [*inputs, pages.bounds], outputs, attributes, MICROSOFT)
        # A shape that goes from a Shape node into a Reshape as it is stays on the host, and no arithmetic with it.
        like = nodes.one("Shape", [turned[0]], f"{name}.shape", _INT64, [3])
        attended = nodes.one("Reshape", [made[0], like], f"{name}.attended", layer.dtype, extents(turned[0]))
        key, value = (self._wound_up(layer, cache, ring) for cache, ring in zip(made[1:], layer.present, strict=True))
        return attended, (key, value), [straight[0], made[1], straight[1], made[2]]

    def _straight(self, layer: AttentionNode, past: ir.Value, taken: ir.Value) -> ir.Value:
        """The ring [B, W, G·D] laid out straight: [B·L / PAGE, PAGE, G, D]."""
        G, D = layer.kv_heads, layer.head_dim
        flat = self._flat(past, times(self._pages.step.batch, self._window), G, D)
        shape = [self._pages.extent, PAGE, G, D]
        return self._pages.step.nodes.one(
            "Gather", [flat, taken], f"{past.name}.gathered", layer.dtype, shape, {"axis": 0}
        )

    def _wound_up(self, layer: AttentionNode, cache: ir.Value, present: ir.Value) -> ir.Value:
        """The ring [B, W, G·D] out of the scratch memory; its value has another name than `present` for now."""
        width = layer.kv_heads * layer.head_dim
        flat = self._flat(cache, times(self._pages.extent, PAGE), width)
        shape = [self._pages.step.batch, self._window, width]
        inputs = [flat, self._kept_BW]
        return self._pages.step.nodes.one("Gather", inputs, f"{present.name}.wound", layer.dtype, shape, {"axis": 0})

    def _flat(self, value: ir.Value, first: Extent, *rest: int) -> ir.Value:
        """`value` in the shape [first, *rest]."""
        constant = self._pages.step.nodes.integers([-1, *rest])
        return self._pages.step.nodes.one(
            "Reshape", [value, constant], f"{value.name}.flat", value.dtype, [first, *rest]
        )

    def _gathered_from(self) -> ir.Value:
        """int64 [B·L / PAGE, PAGE]: the row of a ring [B·W, G, D] that each slot of the scratch memory takes."""
        nodes, L, W = self._pages.step.nodes, self._pages.slots, self._window
        batch = self._pages.step.batch
        position = nodes.one(
            "Add", [self._origin_B1, nodes.integers(np.arange(L)[None])], f"{self._name}.position", _INT64, [batch, L]
        )
        slot = nodes.one("Mod", [position, nodes.integers(W)], f"{self._name}.slot", _INT64, [batch, L])
        ring_B1 = nodes.one(
            "Mul", [self._pages.step.row_B1, nodes.integers(W)], f"{self._name}.ring", _INT64, [batch, 1]
        )
        row = nodes.one("Add", [slot, ring_B1], f"{self._name}.ring_row", _INT64, [batch, L])
        shape = [self._pages.extent, PAGE]
        return nodes.one("Reshape", [row, nodes.integers([-1, PAGE])], f"{self._name}.taken", _INT64, shape)

    def _wound_up_from(self) -> ir.Value:
        """int64 [B, W]: the row of the scratch memory [B·L, G·D] that each slot of the ring takes.

        Slot w holds position end − 1 − ((end − 1 − w) mod W). Before the ring is full that may be negative: nobody has
        written the slot, nobody sees it, and it takes the first.
        """
        nodes, W = self._pages.step.nodes, self._window
        batch = self._pages.step.batch
        end_B1 = self._column("Add", self._pages.step.start_B, self._pages.step.count_B, "end")
        from_end = nodes.integers(np.arange(W - 1, -1, -1)[None])  # W − 1 − w, never negative
        ahead = nodes.one("Add", [end_B1, from_end], f"{self._name}.ahead", _INT64, [batch, W])
        age = nodes.one("Mod", [ahead, nodes.integers(W)], f"{self._name}.age", _INT64, [batch, W])
        length = nodes.one("Sub", [end_B1, self._origin_B1], f"{self._name}.length", _INT64, [batch, 1])
        last = nodes.one("Sub", [length, nodes.integers(1)], f"{self._name}.last", _INT64, [batch, 1])
        slot = nodes.one("Sub", [last, age], f"{self._name}.straight", _INT64, [batch, W])
        written = nodes.one("Max", [slot, nodes.integers(0)], f"{self._name}.straight_slot", _INT64, [batch, W])
        return nodes.one("Add", [written, self._pages.first_slot_B1], f"{self._name}.kept", _INT64, [batch, W])

    def _of_rows(self, op: str, value: ir.Value, number: int, name: str) -> ir.Value:
        nodes = self._pages.step.nodes
        return nodes.one(op, [value, nodes.integers(number)], f"{self._name}.{name}", _INT64, [self._pages.step.batch])

    def _column(self, op: str, left: ir.Value, right: ir.Value, name: str) -> ir.Value:
        """[B, 1] of two values [B]."""
        nodes, batch = self._pages.step.nodes, self._pages.step.batch
        made = nodes.one(op, [left, right], f"{self._name}.{name}_row", _INT64, [batch])
        return nodes.one("Unsqueeze", [made, nodes.integers([1])], f"{self._name}.{name}", _INT64, [batch, 1])


def done(step: Step, layer: AttentionNode, rings: tuple[ir.Value, ir.Value]) -> ir.Value:
    """int64 [1]: a zero that is there when the layer's rings are written, and the scratch memory is free.

    Nothing but data says in which order nodes run, and the next layer's gather reads none of this layer's. Whatever a
    key may be, nought times its integer is nought.
    """
    nodes, name = step.nodes, str(layer.attended.name)
    firsts = []
    for ring in rings:
        shape = [times(*extents(ring))]
        flat = nodes.one("Reshape", [ring, nodes.integers([-1])], f"{ring.name}.flat", layer.dtype, shape)
        first = nodes.integers([0])
        firsts.append(nodes.one("Gather", [flat, first], f"{ring.name}.first", layer.dtype, [1], {"axis": 0}))
    both = nodes.one("Add", firsts, f"{name}.firsts", layer.dtype, [1])
    number = nodes.one("Cast", [both], f"{name}.integer", _INT64, [1], {"to": int(_INT64)})
    return nodes.one("Mul", [number, nodes.integers([0])], f"{name}.done", _INT64, [1])
