"""What a backend is: a module with `CAPABILITIES` and `open_engine`, and an engine that runs steps.

Adding one takes a file in this folder and a line in the table of `runtime/backends/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle, Progress
from runtime.chunking import Int64Array
from runtime.profile import StepRun


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can run exactly.

    devices: begins with the default. storage_types: in which weights may lie in files, as safetensors spells them.
    arithmetic: types that it computes in, as in the manifest. engines: whether it runs engines that `cierzo build` made
    of a bundle, so that one of them can be named. threads: whether the number of threads can be chosen.
    """

    name: str
    devices: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    storage_types: tuple[str, ...]
    arithmetic: tuple[str, ...]
    engines: bool = False
    threads: bool = False


@dataclass(frozen=True, slots=True)
class Numerics:
    """What an engine's numbers are, for whoever judges them.

    arithmetic: the type of products: "float32", "float16" or "bfloat16". kv: that of keys and values in the buffers, as
    in the manifest, or "bfloat16" or "float8". rounds_activations: whether they are rounded to 8 bits before quantised
    weights. rings: how many buffers of each kind are held: 2 where a step does not write in place. window_slots: slots
    of a ring beyond its window, None for a chunk less one; context_slots: those beyond the context, of a layer without
    a window.
    """

    arithmetic: str
    kv: str
    rounds_activations: bool
    rings: int = 1
    window_slots: int | None = None
    context_slots: int = 0


@dataclass(frozen=True, slots=True)
class TopLogits:
    """The highest logits of tokens, best first; of equal ones that of the lower id first.

    values_BRK: float32 [B, R, K]; where a token's logits hold a NaN anywhere, the first of them is NaN and all else
    means nothing. ids_BRK: int64 [B, R, K].
    """

    values_BRK: NDArray[np.float32]
    ids_BRK: Int64Array


class TopSteps(Protocol):
    """Steps of an engine that brings only the highest logits from its device to the host."""

    @property
    def most(self) -> int:
        """How many it gives at most."""
        ...

    def step(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
        count: int,
    ) -> TopLogits:
        """As `Engine.step`, with R 0 or 1, but only the `count` highest logits: 1 <= count <= most, count <= V."""
        ...

    def logits(self) -> NDArray[np.float32]:
        """All logits [B, R, V] of the last of these steps, valid until the next step of the engine."""
        ...


class Engine(Protocol):
    """A loaded model with its KV buffers. It keeps no positions: the session passes them with every step."""

    @property
    def batch(self) -> int:
        """How many rows the KV buffers hold."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes held for the KV buffers."""
        ...

    @property
    def kernels(self) -> tuple[str, ...]:
        """The plugin ops of the graph that native kernels run, by name; the others run their function bodies."""
        ...

    @property
    def numerics(self) -> Numerics:
        """In which types it computes and keeps keys and values."""
        ...

    @property
    def built(self) -> str | None:
        """Name of the engine that `cierzo build` made and that runs; None where the bundle's own graph does."""
        ...

    @property
    def device(self) -> str:
        """What it runs on, for a person."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes this engine slower than it could be, each a sentence for a person; mostly nothing."""
        ...

    def end_profile(self) -> tuple[StepRun, ...]:
        """End the profile that the engine was opened with; all steps so far, none if there was no profile."""
        ...

    def allocate(self, batch: int) -> None:
        """Replace the KV buffers by zeroed ones for `batch` rows."""
        ...

    def clear(self) -> None:
        """Zero the KV buffers."""
        ...

    def step(
        self,
        input_ids: Int64Array,
        start_positions: Int64Array,
        token_counts: Int64Array,
        logit_positions: Int64Array,
    ) -> NDArray[np.float32]:
        """Feed int64 [B, T], [B], [B], [B, R]; return float32 logits [B, R, V], valid until the next step.

        logit_positions: for each row the tokens t of the chunk, 0 <= t < T, whose logits are wanted. R may be 0: then
        the step only rolls the buffers on. R <= T.
        """
        ...

    @property
    def top(self) -> TopSteps | None:
        """Steps that give the highest logits alone; None for an engine whose logits are on the host anyway."""
        ...


class Backend(Protocol):
    """The module of a backend, as the registry sees it."""

    CAPABILITIES: Capabilities

    def open_engine(
        self,
        bundle: Bundle,
        *,
        device: str,
        threads: int | None,
        profile: Path | None,
        engine: str | None,
        progress: Progress | None,
    ) -> Engine:
        """Load `bundle` on `device` with buffers for one row.

        profile: a folder for a profile of all steps, or None. engine: which of the bundle's engines to take, None for
        the one that fits; always None where there are none (`Capabilities.engines`). progress: called with (stage,
        done, total) while weights are brought to a device.
        """
        ...
