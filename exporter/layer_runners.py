"""The two sides of the comparison by module, as Polygraphy's runners: one infer() is one group of modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from exporter.gate.routers import first_undecided
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
    budgets: those of the group that was asked for last. limits: how many tokens each of its modules is compared at. In
    a mixture that rounds, a module is compared before the first token of which a router in front of it is undecided
    (`exporter.gate.routers`): from there on the engine may have taken another expert. decided: the last such limit.
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
        self.limits: dict[str, int] = {}
        self.decided = len(row)
        moe = checkpoint.config.moe
        self._top_k = moe.top_k if moe is not None and self._dtype != "float32" else None

    def outputs(self, group: int) -> Arrays:
        truth: Arrays = {}
        self.budgets, self.limits = {}, {}
        for stage in self._groups[group]:
            outputs = next(self._truth), next(self._own)
            self._limit(stage, *outputs)
            wide, narrow = (self._kept(side, stage) for side in outputs)
            for path, array in wide.items():
                self.budgets[path] = budget([array], [narrow[path]], self._dtype)
            truth |= wide
            if self._progress is not None:
                self._progress("reference by module", stage + 1, len(self._stages))
        return truth

    def _limit(self, stage: int, truth: Outputs, own: Outputs) -> None:
        before = self.decided
        for path, logits_TE in truth.items():
            if self._top_k is not None and path.endswith(".moe.router"):
                rounded_TE = own[path].double().numpy()
                self.decided = min(before, first_undecided(logits_TE.numpy(), rounded_TE, self._top_k))
        for path in self._stages[stage]:
            behind = path.endswith(".moe") or path.count(".") == 1  # a mixture's own output, and its layer's
            self.limits[path] = self.decided if behind else before

    def _kept(self, outputs: Outputs, stage: int) -> Arrays:
        return {
            path: cut(outputs[path].numpy()[self._positions], self._positions, self.limits[path])
            for path in self._stages[stage]
        }


def cut(array: npt.NDArray[Any], positions: npt.NDArray[np.int64], limit: int) -> npt.NDArray[Any]:
    """A module's output [positions, features] with zeros at positions from `limit` on, which are not compared."""
    return np.where((positions < limit)[:, None], array, 0)
