"""An engine that can tell its highest logits apart: ONNX Runtime's, with the search done in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import Session
from runtime.backends.base import TopLogits
from runtime.backends.onnxruntime import OnnxRuntimeEngine
from runtime.bundle import Bundle
from runtime.chunking import Int64Array


class TopEngine(OnnxRuntimeEngine):
    """most: how many it tells at most. change: what is done to logits before anybody sees them.

    asked: how many were asked for in each step. fetched: how often all logits were.
    """

    def __init__(self, bundle: Bundle, most: int, change: Any = None) -> None:
        self.most, self.asked, self.fetched = most, list[int](), 0
        self._change = change
        super().__init__(bundle, threads=1)

    @property
    def top(self) -> _Top:  # type: ignore[override]
        return _Top(self)

    def step(self, *inputs: Any) -> NDArray[np.float32]:
        logits_BRV = super().step(*inputs)
        return logits_BRV if self._change is None else np.asarray(self._change(logits_BRV), np.float32)


class _Top:
    def __init__(self, engine: TopEngine) -> None:
        self._engine = engine
        self.most: int = engine.most

    def step(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
        count: int,
    ) -> TopLogits:
        logits_BRV = self._engine.step(input_ids, start_positions, token_counts, logit_positions)
        self._last = logits_BRV
        self._engine.asked.append(count)
        assert logits_BRV.shape[1] <= 1
        order = np.argsort(-logits_BRV, axis=-1, kind="stable")[..., :count]
        values = np.take_along_axis(logits_BRV, order, axis=-1)
        # A kernel need not know more of a row with a NaN than that there is one.
        broken = np.isnan(logits_BRV).any(axis=-1)
        values[broken] = np.nan
        return TopLogits(values, order.astype(np.int64))

    def logits(self) -> NDArray[np.float32]:
        self._engine.fetched += 1
        return self._last


def open_top(bundle: Bundle, most: int, change: Any = None) -> tuple[Session, TopEngine]:
    """A session of such an engine, and the engine."""
    engine = TopEngine(bundle, most, change)
    return Session(bundle, engine), engine
