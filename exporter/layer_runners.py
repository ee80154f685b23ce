"""The two sides of the comparison by module, as Polygraphy's runners: one infer() is one group of modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from exporter.quantized_reference import QuantizedReference
from reference.checkpoint import Checkpoint
from reference.parity import Budget, budget
from reference.watched import Outputs, WatchedOracle

GROUP = "group"
"""The one input of both runners: which group of modules is asked for. The row of tokens is theirs from the start."""

Arrays = dict[str, npt.NDArray[Any]]
Progress = Callable[[str, int, int], None]


class _GroupRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy ships no types
    """Answers the number of a group with the outputs of its modules."""

    def get_input_metadata_impl(self) -> Any:
        return TensorMetadata().add(GROUP, dtype=np.int64, shape=(1,))

    def infer_impl(self, feed_dict: dict[str, npt.NDArray[Any]]) -> Arrays:
        began = time.perf_counter()
        outputs = self.outputs(int(feed_dict[GROUP][0]))
        self.inference_time = time.perf_counter() - began
        return outputs

    def outputs(self, group: int) -> Arrays:
        """Module path to output [T, features]."""
        raise KeyError(group)


class EngineRunner(_GroupRunner):
    """The bundle's graph with taps."""

    def __init__(self, outputs: Callable[[int], Arrays]) -> None:
        super().__init__(name="engine")
        self._outputs = outputs

    def outputs(self, group: int) -> Arrays:
        return self._outputs(group)


class ReferenceRunner(_GroupRunner):
    """The reference in float64. It runs in float32, rounding as the engine does, beside it: from that come `budgets`.

    The groups must be asked for in order, since the layers are streamed: nothing of an earlier one is left.
    budgets: those of the group that was asked for last.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantized: QuantizedReference,
        row: npt.NDArray[np.int64],
        stages: Sequence[Sequence[str]],
        groups: Sequence[Sequence[int]],
        positions: npt.NDArray[np.int64],
        progress: Progress | None,
    ) -> None:
        super().__init__(name="reference")
        oracle = WatchedOracle(checkpoint, quantized.weights)
        self._truth = oracle.stages(row.tolist(), torch.float64)
        self._own = oracle.stages(row.tolist(), torch.float32, quantized.rounding)
        self._stages, self._groups, self._positions = stages, groups, positions
        self._dtype, self._progress = quantized.rounding.kind, progress
        self.budgets: dict[str, Budget] = {}

    def outputs(self, group: int) -> Arrays:
        truth: Arrays = {}
        self.budgets = {}
        for stage in self._groups[group]:
            wide, narrow = self._kept(self._truth, stage), self._kept(self._own, stage)
            for path, array in wide.items():
                self.budgets[path] = budget([array], [narrow[path]], self._dtype)
            truth |= wide
            if self._progress is not None:
                self._progress("reference by module", stage + 1, len(self._stages))
        return truth

    def _kept(self, side: Iterator[Outputs], stage: int) -> Arrays:
        outputs = next(side)
        return {path: outputs[path].numpy()[self._positions] for path in self._stages[stage]}
