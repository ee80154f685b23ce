"""What the attention of all layers reads about a step: who is where, computed once and on the device.

Letters: B batch rows, T tokens of a step.
"""

from __future__ import annotations

from functools import cached_property

import onnx_ir as ir

from graph_passes.lower.ort.attention_nodes import AttentionNode
from graph_passes.lower.ort.nodes import Extent, Nodes, extents
from graph_passes.lower.ort.plan import DECODE, PREFILL
from runtime.errors import FusionError

_INT64 = ir.DataType.INT64


class Step:
    """A step of one token (DECODE) or many (PREFILL), where its first attention node stands.

    Values are inserted when they are first asked for, and so before all that reads them.
    """

    def __init__(self, model: ir.Model, kind: str, first: AttentionNode) -> None:
        if kind not in (PREFILL, DECODE):
            raise FusionError(f"A step is {PREFILL} or {DECODE}, not {kind}.")
        self.nodes = Nodes(model, first.node)
        self.decodes = kind == DECODE
        self.start_B = first.start
        self.count_B = first.count
        self._first = first

    @property
    def batch(self) -> Extent:
        """B as shapes have it."""
        return extents(self.start_B)[0]

    @cached_property
    def ones_BT(self) -> ir.Value:
        """int64 [B, T] of ones."""
        cos = self._first.cos
        shape = self.nodes.one("Shape", [cos], "attention.step_shape", _INT64, [2], {"start": 0, "end": 2})
        return self.nodes.one("Expand", [self.nodes.integers([[1]]), shape], "attention.ones", _INT64, extents(cos)[:2])

    @cached_property
    def tokens_B(self) -> ir.Value:
        """int64 [B]: T in every row, or a constant [1] where T is 1."""
        if self.decodes:
            return self.nodes.integers([1])
        axis = self.nodes.integers(1)
        counted = self.nodes.one("CumSum", [self.ones_BT, axis], "attention.counted", _INT64, extents(self.ones_BT))
        last = self.nodes.integers(-1)
        return self.nodes.one("Gather", [counted, last], "attention.tokens", _INT64, [self.batch], {"axis": 1})

    @cached_property
    def reached_B(self) -> ir.Value:
        """int64 [B]: start + T, the position behind the last token of the step, padding included."""
        return self.nodes.one("Add", [self.start_B, self.tokens_B], "attention.reached", _INT64, [self.batch])

    @cached_property
    def row_B1(self) -> ir.Value:
        """int64 [B, 1]: the number of each row."""
        ones = self.nodes.one(
            "Gather",
            [self.ones_BT, self.nodes.integers([0])],
            "attention.row_ones",
            _INT64,
            [self.batch, 1],
            {"axis": 1},
        )
        axis = self.nodes.integers(0)
        return self.nodes.one("CumSum", [ones, axis], "attention.rows", _INT64, [self.batch, 1], {"exclusive": 1})
