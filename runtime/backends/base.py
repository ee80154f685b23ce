"""What a backend is: a module with `CAPABILITIES` and `open_engine`, and an engine that runs steps.

Adding one takes a file in this folder and a line in the table of `runtime/backends/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.chunking import Int64Array
from runtime.profile import StepRun


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can run exactly.

    devices: begins with the default. storage_types: in which weights may lie in files, as safetensors spells them.
    arithmetic: types that it computes in, as in the manifest.
    """

    name: str
    devices: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    storage_types: tuple[str, ...]
    arithmetic: tuple[str, ...]


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


class Backend(Protocol):
    """The module of a backend, as the registry sees it."""

    CAPABILITIES: Capabilities

    def open_engine(self, bundle: Bundle, *, device: str, threads: int | None, profile: Path | None) -> Engine:
        """Load `bundle` on `device` with buffers for one row. profile: a folder for a profile of all steps, or None."""
        ...
